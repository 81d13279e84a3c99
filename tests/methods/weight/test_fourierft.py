"""FourierFT: a worked wave, the two ways to compute it, its places, starts, merging, counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight.fourierft import _angles, drawn_places, fourierft
from tests.kept import residuals
from tests.methods.golden import full_size
from tests.methods.small import attached

X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 24)), jnp.float32)
MODEL = nn.Dense(20)
# Of 480 numbers: waves of 5 are less work than the kernel, of 40 more.
METHODS = {'few': fourierft(5, 900, ''), 'many': fourierft(40, 900, '')}


@pytest.fixture(scope='module')
def variables():
  return MODEL.init(jax.random.key(0), X)


def test_a_worked_wave():
  """One frequency (q, p) of a kernel [4, 2]: 2 / 8 cos(2 pi (p i / 4 + q j / 2)), s = 2."""
  model = nn.Dense(2, use_bias=False)
  x = jnp.eye(4)
  variables = {'params': {'kernel': jnp.zeros((4, 2))}}
  tuned = jpeft.attach(model, fourierft(1, 2, ''), variables, x)
  (place,) = drawn_places(777, 8, 1)
  q, p = divmod(int(place), 4)
  i, j = np.arange(4)[:, None], np.arange(2)
  want = 2 / 8 * np.cos(2 * np.pi * (p * i / 4 + q * j / 2))
  theta = {'fourierft': {'': {'kernel': {'c': jnp.ones(1)}}}}
  np.testing.assert_allclose(tuned.apply(theta, variables, x), want, atol=1e-6)
  np.testing.assert_allclose(tuned.merge(theta, variables)['params']['kernel'], want, atol=1e-6)


def test_places_are_those_that_peft_draws():
  """torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:5], by torch 2."""
  assert drawn_places(777, 1000, 5).tolist() == [735, 819, 201, 799, 435]
  assert drawn_places(5, 768 * 768, 5).tolist() == [297827, 477792, 295289, 339375, 172910]
  assert sorted(drawn_places(1, 50, 50)) == list(range(50))


@pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)
def test_both_ways_are_the_merged_kernel(method, variables):
  tuned, theta = attached(MODEL, variables, method, X)
  plain = MODEL.apply(variables, X)
  start = tuned.init(jax.random.key(0), variables)
  np.testing.assert_array_equal(tuned.apply(start, variables, X), plain)

  def loss(theta):
    return jnp.sum(jnp.sin(tuned.apply(theta, variables, X)))

  def of_whole(theta):
    return jnp.sum(jnp.sin(MODEL.apply(tuned.merge(theta, variables), X)))

  assert np.abs(tuned.apply(theta, variables, X) - plain).max() > 1e-2
  found, want = jax.value_and_grad(loss)(theta), jax.value_and_grad(of_whole)(theta)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), found, want)
  kept = residuals(
    lambda theta, variables, x: tuned.apply(theta, variables, x),
    theta,
    variables,
    X,
    weights=(variables, theta),
  )
  assert (24, 20) not in [leaf.shape for leaf in kept]


def test_counts_on_llama_7b():
  """1,000 a kernel, queries and values of 32 layers: 64,000, as in the paper."""
  llama = full_size.llama(32, 4096, 11008)
  tuned = jpeft.attach(llama.model, fourierft(), *llama.shapes)
  assert jpeft.summary(tuned).trainable == 64_000


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'count': 0}, 'fourierft: count=0 must be a whole number, at least 1'),
    ({'scale': 0}, 'fourierft: scale=0 must be greater than 0'),
    ({'init': 'ones'}, "fourierft: init='ones' is none of 'zero', 'normal'"),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    fourierft(**hyperparameters)


def test_more_frequencies_than_the_kernel_has_are_refused(variables):
  with pytest.raises(ValueError, match=r'count=481 frequencies are more than a kernel \[24, 20\]'):
    jpeft.attach(MODEL, fourierft(481, targets=''), variables, X)


def test_waves_of_large_kernels_are_exact():
  """Of 128,000 inputs, where f i leaves 32 bits."""
  size, frequencies = 128_000, np.array([127_999, 70_003], np.int32)
  i = np.arange(size, dtype=np.int64)[:, None]
  want = 2 * np.pi / size * (i * frequencies % size)
  np.testing.assert_allclose(_angles(size, frequencies), want, atol=1e-5)
