"""LoHa and HiRA: worked numbers, starts, merging, counts, and what a step keeps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight.hadamard import hira, loha, products_of_columns
from tests.kept import residuals
from tests.methods.golden import full_size
from tests.methods.small import attached

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(7, 24)), jnp.float32)
MODEL = nn.Dense(20)


@pytest.fixture(scope='module')
def variables():
  return MODEL.init(jax.random.key(0), X)


def test_a_worked_update():
  """(a1 b1) * (a2 b2) = [[1, 2], [2, 4]] * [[3, 0], [6, 0]], scaled by 4 / 1."""
  model = nn.Dense(2, use_bias=False)
  x = jnp.eye(2)
  variables = {'params': {'kernel': jnp.zeros((2, 2))}}
  tuned = jpeft.attach(model, loha(1, 4, targets=''), variables, x)
  t = {'a1': [[1.0], [2.0]], 'b1': [[1.0, 2.0]], 'a2': [[1.0], [2.0]], 'b2': [[3.0, 0.0]]}
  theta = {'loha': {'': {'kernel': {part: jnp.array(x) for part, x in t.items()}}}}
  want = [[12, 0], [48, 0]]
  np.testing.assert_array_equal(tuned.apply(theta, variables, x), want)
  np.testing.assert_array_equal(tuned.merge(theta, variables)['params']['kernel'], want)


def test_a_worked_product_with_the_kernel():
  """w + w * (u v) of w = [[1, 2], [3, 4]] and u v = [[1, 0], [2, 0]]."""
  model = nn.Dense(2, use_bias=False)
  x = jnp.eye(2)
  variables = {'params': {'kernel': jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
  tuned = jpeft.attach(model, hira(1, targets=''), variables, x)
  t = {'u': jnp.array([[1.0], [2.0]]), 'v': jnp.array([[1.0, 0.0]])}
  theta = {'hira': {'': {'kernel': t}}}
  np.testing.assert_array_equal(tuned.apply(theta, variables, x), [[2, 2], [9, 4]])


def test_dropout_meets_the_update_alone(variables):
  tuned, theta = attached(MODEL, variables, hira(3, '', dropout=1.0), X)
  plain = MODEL.apply(variables, X)
  assert np.abs(tuned.apply(theta, variables, X) - plain).max() > 1e-3
  dropped = tuned.apply(theta, variables, X, rngs={'dropout': jax.random.key(0)})
  np.testing.assert_allclose(dropped, plain, atol=1e-6)


def test_products_of_columns_are_the_entrywise_product():
  a1, a2 = RNG.normal(size=(2, 6, 3))
  b1, b2 = RNG.normal(size=(2, 3, 5))
  a, b = products_of_columns(a1, a2), products_of_columns(b1.T, b2.T).T
  assert a.shape == (6, 9) and b.shape == (9, 5)
  np.testing.assert_allclose(a @ b, (a1 @ b1) * (a2 @ b2), rtol=1e-10)


METHODS = {
  'loha_of_few': loha(2, 3),
  'loha_of_many': loha(6, 3),
  'hira': hira(3),
}


@pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)
def test_gradients_are_those_of_the_whole_update(method, variables):
  (rule,) = [rule for _, rule in method]
  tuned, theta = attached(MODEL, variables, jpeft.at('', rule), X)

  def loss(theta):
    return jnp.sum(jnp.sin(tuned.apply(theta, variables, X)))

  def of_whole(theta):
    return jnp.sum(jnp.sin(MODEL.apply(tuned.merge(theta, variables), X)))

  found, want = jax.grad(loss)(theta), jax.grad(of_whole)(theta)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, want)


@pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)
def test_no_array_of_the_kernels_size_is_kept(method, variables):
  (rule,) = [rule for _, rule in method]
  tuned, theta = attached(MODEL, variables, jpeft.at('', rule), X)
  kept = residuals(
    lambda theta, variables, x: tuned.apply(theta, variables, x),
    theta,
    variables,
    X,
    weights=(variables, theta),
  )
  assert (24, 20) not in [leaf.shape for leaf in kept]


def test_counts_on_llama_7b():
  """2 r (fan_in + fan_out) a kernel, queries and values of 32 layers."""
  llama = full_size.llama(32, 4096, 11008)
  tuned = jpeft.attach(llama.model, loha(8), *llama.shapes)
  assert jpeft.summary(tuned).trainable == 64 * 2 * 8 * (4096 + 4096) == 8_388_608


@pytest.mark.parametrize(
  ('make', 'hyperparameters', 'message'),
  [
    (loha, {'rank': 0}, 'rank must be a whole number, at least 1'),
    (hira, {'dropout': 2}, 'dropout must lie in'),
    (loha, {'alpha': 0}, 'loha: alpha=0 must be greater than 0'),
  ],
)
def test_hyperparameters_are_checked(make, hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    make(**hyperparameters)
