"""RandLoRA: the sum by hand, its rank, bases that layers share, and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.export.peft_matrices import lone_site
from jpeft.methods import bases_of
from jpeft.thetas import on_matrix
from tests.methods import small
from tests.methods.golden import full_size

RNG = np.random.default_rng(0)


def drawn(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('shape', ((5, 7), (7, 5)))
def test_the_update_is_the_sum_of_its_pairs(shape):
  rank, count = 2, 3
  a, b = drawn(rank, 5), drawn(7, count, rank)
  t = {'l': drawn(rank, count), 'g': drawn(count, 5)}
  u = np.zeros((7, 5))
  for k in range(rank * count):
    row = t['l'][k // count, k % count] * a[k // count] * t['g'][k % count]
    u += np.outer(b[:, k // rank, k % rank], row)
  want = 3 / 2 * (u.T if shape == (5, 7) else u)
  found = changed(jpeft.randlora(2, 3, bases=(a, b)), t, shape)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def changed(method, t, shape):
  """What a method adds to a kernel of zeros."""
  ((_, rule),) = method
  return on_matrix(rule, lone_site('', 'kernel', shape), 'kernel', t, jnp.zeros(shape))


def test_the_update_has_full_rank():
  t = {'l': drawn(2, 6), 'g': drawn(6, 12)}
  assert np.linalg.matrix_rank(changed(jpeft.randlora(2), t, (12, 16))) == 12


def test_smaller_layers_have_the_first_entries_of_larger_ones():
  a, b = bases_of(3, 2, 12, 16)
  for fan_in, fan_out in ((5, 9), (9, 5)):
    own_a, own_b = bases_of(3, 2, fan_in, fan_out)
    np.testing.assert_array_equal(own_a, a[:, :5])
    np.testing.assert_array_equal(own_b, b[:9, :3])
  assert abs(float(jnp.std(b)) - 1) < 0.1 and not np.array_equal(bases_of(4, 2, 12, 16)[0], a)


def test_it_starts_unchanged_and_counts_as_told():
  model, held = small.vit()
  tuned = jpeft.attach(model, jpeft.randlora(4), held, small.IMAGES)
  theta = tuned.init(jax.random.key(0), held)
  out = jax.jit(tuned.apply)(theta, held, small.IMAGES)
  np.testing.assert_allclose(out, jax.jit(model.apply)(held, small.IMAGES), atol=1e-6)
  assert theta['randlora']['encoder/block_0/attention/query']['kernel']['g'][0, 0] == 1 / 32
  roberta = full_size.roberta_base()
  tuned = jpeft.attach(roberta.model, jpeft.randlora(32), *roberta.shapes)
  assert jpeft.summary(tuned).trainable == 24 * 24 * (32 + 768)


def test_hyperparameters_are_checked():
  pair = np.zeros((2, 16)), np.zeros((16, 8, 3))
  with pytest.raises(ValueError, match=r'bases=\[\[2, 16\], \[16, 8, 3\]\] must be \[2, m\]'):
    jpeft.randlora(2, bases=pair)
  model, held = small.vit()
  short = jpeft.randlora(2, bases=(np.zeros((2, 16)), np.zeros((16, 8, 2))))
  with pytest.raises(ValueError, match=r'do not reach for a kernel \[32, 32\], which needs \[2, 3'):
    jpeft.attach(model, short, held, small.IMAGES)
