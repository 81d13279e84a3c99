"""OFT and BOFT: worked rotations, permutations, starts, gradients, counts, and what is kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight.orthogonal import boft, butterfly, nearest_divisor, oft, rotation, skew
from tests.kept import residuals
from tests.methods.golden import full_size
from tests.methods.small import attached

X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 24)), jnp.float32)
MODEL = nn.Dense(20)
METHODS = {
  'oft': oft(4, ''),
  'exact': oft(4, '', terms=0),
  'shared': oft(targets='', blocks=3, shared=True),
  'boft': boft(4, '', factors=2),
}


@pytest.fixture(scope='module')
def variables():
  return MODEL.init(jax.random.key(0), X)


@pytest.mark.parametrize('terms', [0, 24])
def test_a_worked_rotation(terms):
  """Of q = [[0, 1/2], [-1/2, 0]]: cosine 3/5, sine 4/5; the series is that of the inverse."""
  found = rotation(skew(jnp.array([0.5])), terms)
  want = np.array([[0.6, -0.8], [0.8, 0.6]])
  np.testing.assert_allclose(found, want if terms == 0 else want.T, atol=1e-6)


def test_four_terms_of_the_series():
  q = np.asarray(skew(jnp.array([0.1, -0.3, 0.2])))
  want = np.eye(3) + 2 * q + 2 * q @ q + q @ q @ q
  np.testing.assert_allclose(rotation(jnp.asarray(q), 4), want, atol=1e-6)


def test_butterflies_of_blocks():
  np.testing.assert_array_equal(butterfly(8, 2, 0), np.arange(8))
  np.testing.assert_array_equal(butterfly(8, 2, 1), [0, 2, 1, 3, 4, 6, 5, 7])
  np.testing.assert_array_equal(butterfly(8, 2, 2), [0, 2, 4, 6, 1, 3, 5, 7])
  np.testing.assert_array_equal(butterfly(8, 4, 1), [0, 1, 4, 5, 2, 3, 6, 7])


def test_blocks_are_of_the_nearest_size():
  found = [nearest_divisor(12, n) for n in (1, 4, 5, 7, 8, 9, 40)]
  assert found == [1, 4, 4, 6, 6, 6, 12]


@pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)
def test_rotations_keep_lengths_and_merge(method, variables):
  tuned, theta = attached(MODEL, variables, method, X)
  plain = MODEL.apply(variables, X)
  start = tuned.init(jax.random.key(0), variables)
  np.testing.assert_allclose(tuned.apply(start, variables, X), plain, atol=1e-5)
  merged = tuned.merge(theta, variables)
  out = tuned.apply(theta, variables, X)
  assert np.abs(out - plain).max() > 1e-2
  np.testing.assert_allclose(MODEL.apply(merged, X), out, atol=1e-5)
  if method is not METHODS['exact']:
    return
  lengths = (np.linalg.norm(held['params']['kernel'], axis=0) for held in (merged, variables))
  np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)
def test_gradients_are_those_of_the_rotated_kernel(method, variables):
  tuned, theta = attached(MODEL, variables, method, X)

  def loss(theta):
    return jnp.sum(jnp.sin(tuned.apply(theta, variables, X)))

  def of_whole(theta):
    return jnp.sum(jnp.sin(MODEL.apply(tuned.merge(theta, variables), X)))

  found, want = jax.grad(loss)(theta), jax.grad(of_whole)(theta)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, want)
  kept = residuals(
    lambda theta, variables, x: tuned.apply(theta, variables, x),
    theta,
    variables,
    X,
    weights=(variables, theta),
  )
  assert [leaf.shape for leaf in kept if leaf.shape in ((7, 6, 4), (24, 20))] == []


def test_counts_on_llama_7b():
  """128 blocks of 32 x 31 / 2; 2 factors of 1,024 blocks of 4 x 4, and 4,096 gains."""
  llama = full_size.llama(32, 4096, 11008)
  tuned = jpeft.attach(llama.model, oft(32), *llama.shapes)
  assert jpeft.summary(tuned).trainable == 64 * 128 * 496 == 4_063_232
  tuned = jpeft.attach(llama.model, boft(4, factors=2), *llama.shapes)
  assert jpeft.summary(tuned).trainable == 64 * (2 * 1024 * 16 + 4096) == 2_359_296


@pytest.mark.parametrize(
  ('make', 'hyperparameters', 'message'),
  [
    (oft, {'block': 1}, 'oft: block=1 must be a whole number, at least 2'),
    (oft, {'blocks': 0}, 'oft: blocks=0 must be a whole number, at least 1'),
    (oft, {'terms': 3}, 'oft: terms=3 must be 0, or at least 4'),
    (boft, {'block': 3, 'factors': 2}, 'boft: block=3 must be even with several factors'),
  ],
)
def test_hyperparameters_are_checked(make, hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    make(**hyperparameters)


def test_a_kernel_that_has_no_such_blocks_is_refused(variables):
  with pytest.raises(ValueError, match=r'boft: block=10 times 2\^\(factors - 1\) divides no 24'):
    jpeft.attach(MODEL, boft(10, ''), variables, X)
