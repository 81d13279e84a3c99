"""Attention functions with more keys; masks and biases are tested with prefix tuning."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_rows_of_one_example_and_of_each():
  q, k, v = normal(2, 4, 3, 5), normal(2, 6, 3, 5), normal(2, 6, 3, 5)
  keys, values = normal(2, 7, 3, 5), normal(2, 7, 3, 5)
  each = jpeft.more_keys(nn.dot_product_attention, keys, values)(q, k, v)
  for i in range(2):
    one = jpeft.more_keys(nn.dot_product_attention, keys[i], values[i])(q, k, v)
    np.testing.assert_allclose(one[i], each[i], atol=1e-6)
  want = nn.dot_product_attention(q, jnp.concatenate([keys, k], 1), jnp.concatenate([values, v], 1))
  np.testing.assert_allclose(each, want, atol=1e-6)


def test_no_rows_are_the_attention_itself():
  q, k, v = normal(2, 4, 3, 5), normal(2, 6, 3, 5), normal(2, 6, 3, 5)
  mask = jnp.arange(6) < 4
  none = jnp.zeros((0, 3, 5))
  out = jpeft.more_keys(nn.dot_product_attention, none, none)(q, k, v, None, mask)
  np.testing.assert_array_equal(out, nn.dot_product_attention(q, k, v, mask=mask))


def test_twice_is_both():
  q, k, v = normal(1, 4, 2, 5), normal(1, 4, 2, 5), normal(1, 4, 2, 5)
  a, b = normal(3, 2, 5), normal(1, 2, 5)
  mask = jnp.tril(jnp.ones((1, 1, 4, 4), bool))
  base = nn.dot_product_attention
  both = jpeft.more_keys(base, jnp.concatenate([a, b]), jnp.concatenate([b, a]))
  nested = jpeft.more_keys(jpeft.more_keys(base, a, jnp.concatenate([b, a[:2]])), b, a[2:])
  np.testing.assert_allclose(both(q, k, v, mask=mask), nested(q, k, v, mask=mask), atol=1e-6)


@pytest.mark.parametrize(
  'keys, values, options, message',
  [
    ((3, 4), (3, 4), {}, r'more keys are \[m, \*\[2, 5\]\].*these are \[3, 4\]'),
    ((3, 2, 5), (3, 2, 4), {}, r'more values are \[m, \*\[2, 5\]\]'),
    ((3, 2, 5), (4, 2, 5), {}, '3 more keys and 4 more values'),
    ((3, 2, 5), (3, 2, 5), {'local_window_size': 2}, 'local_window_size counts keys, and .* 3 m'),
  ],
)
def test_what_does_not_fit(keys, values, options, message):
  q = normal(1, 4, 2, 5)
  more = jpeft.more_keys(jax.nn.dot_product_attention, normal(*keys), normal(*values))
  with pytest.raises(ValueError, match=message):
    more(q, q, q, **options)
