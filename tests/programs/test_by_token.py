"""Whether a function treats each token by itself, read off its program."""

import jax
import jax.numpy as jnp
import pytest

from jpeft.programs import mixing

X = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
SQUARE = jnp.ones((6, 6))
KEY = jax.random.key(0)

APART = {
  'a matrix': lambda x: x @ SQUARE + jnp.arange(6),
  'rows': lambda x: (x.reshape(-1, 6) @ SQUARE).reshape(x.shape),
  'a norm': lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1),
  'a softmax of features': lambda x: jax.nn.softmax(x) * jax.nn.gelu(x),
  'features in two halves': lambda x: jnp.concatenate([x[..., 3:], jax.nn.relu(x[..., :3])], -1),
  'sums of features': lambda x: jnp.cumsum(x, -1),
  'a call': jax.checkpoint(lambda x: jax.jit(jnp.tanh)(x) * 2),
  'as many tokens as features': lambda x: x[..., :5] @ jnp.ones((5, 6)),
  'turned about': lambda x: jnp.swapaxes(jnp.swapaxes(x, 1, 2) * 2, 1, 2),
}
MIXED = {
  'a mean': lambda x: x - x.mean(1, keepdims=True),
  'attention': lambda x: jax.nn.softmax(x @ jnp.swapaxes(x, 1, 2)) @ x,
  'a shift': lambda x: jnp.concatenate([x[:, :1], x[:, :-1]], 1),
  'an order': lambda x: x[:, ::-1],
  'sums': lambda x: jnp.cumsum(x, 1),
  'places': lambda x: x + jnp.arange(x.shape[1])[:, None],
  'others': lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape),
  'their number': lambda x: x if x.shape[1] > 5 else 2 * x,
  'a size': lambda x: x / x.shape[1],
  'a softmax of tokens': lambda x: jax.nn.softmax(x, 1),
  'fewer': lambda x: x[:, :3],
  'a sort': lambda x: jnp.sort(x, 1),
}


@pytest.mark.parametrize('name', APART)
def test_tokens_are_apart(name):
  assert mixing(APART[name], X, 1) == ''


@pytest.mark.parametrize('name', MIXED)
def test_tokens_are_mixed(name):
  assert mixing(MIXED[name], X, 1)


def test_of_what_is_drawn():
  noise = jax.random.normal(KEY, (6,))
  assert mixing(lambda x: x + jax.random.normal(KEY, (6,)) + noise, X, 1) == ''
  found = mixing(lambda x: x * jax.random.bernoulli(KEY, 0.5, x.shape), X, 1)
  assert 'draws random numbers' in found
