"""PST: the worked example, its schedule, exact numbers of zeros, what stays, counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.weight.pst import pst, share_at
from jpeft.methods.weight.ranks import smallest
from tests.fixtures import noisy
from tests.kept import residuals
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, attached, vit

RNG = np.random.default_rng(0)


def dense(w, x, **hyperparameters):
  """(tuned, variables) of one Dense layer with torch's weight [out, in]."""
  model = nn.Dense(w.shape[0], use_bias=False)
  variables = {'params': {'kernel': jnp.asarray(w.T, jnp.float32)}}
  return jpeft.attach(model, pst(targets='', **hyperparameters), variables, x), variables


def with_share(theta, share):
  """theta whose kernels have so many zeros."""

  def leaf(path, x):
    return jnp.full_like(x, share) if path[-1].key == 'share' else x

  return jax.tree_util.tree_map_with_path(leaf, theta)


def test_the_worked_example():
  w = np.array([[0.3, -0.1], [0.2, -0.5]])
  x = jnp.array([[1.0, 2]])
  tuned, variables = dense(w, x, rank=1, score_rank=1)
  theta = with_share(tuned.init(jax.random.key(0), variables), 0.5)
  t = theta['pst']['']['kernel']
  t['columns'] = jnp.array([0.05, 0])  # R of the paper
  t['rows'] = jnp.array([0, 0.3])  # C
  t['b'] = jnp.array([[1.0, 0]])
  merged = tuned.merge(theta, variables)['params']['kernel']
  np.testing.assert_allclose(merged.T, [[0, -0.1], [0, -0.5]], atol=1e-7)
  g = jnp.array([[1.0, -1]])
  grads = jax.grad(lambda theta: jnp.sum(g * tuned.apply(theta, variables, x)))(theta)
  grads = grads['pst']['']['kernel']
  np.testing.assert_allclose(grads['columns'], [0.1, 0.8], atol=1e-6)
  np.testing.assert_allclose(grads['rows'], [0.1, 0.8], atol=1e-6)
  # dW' = [[.3, 2.2], [-.2, -3]] meets b = 1 for the first output and 0 for the second.
  np.testing.assert_allclose(grads['a'][:, 0], [0.3, 2.2], atol=1e-6)
  t['b'] = jnp.array([[0.0, 1]])
  grads = jax.grad(lambda theta: jnp.sum(g * tuned.apply(theta, variables, x)))(theta)
  np.testing.assert_allclose(grads['pst']['']['kernel']['a'][:, 0], [-0.2, -3], atol=1e-6)
  # dS = [[.3, -.2], [-.2, 1]] meets d the same way.
  t['d'] = jnp.array([[1.0, 0]])
  grads = jax.grad(lambda theta: jnp.sum(g * tuned.apply(theta, variables, x)))(theta)
  np.testing.assert_allclose(grads['pst']['']['kernel']['c'][:, 0], [0.3, -0.2], atol=1e-6)


def test_the_schedule():
  shares = {100: 0, 250: 0.520312, 400: 0.7875, 550: 0.885938, 700: 0.9, 1000: 0.9}
  for step, share in shares.items():
    assert share_at(step / 1000, 0.9) == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize('count', [0, 1, 100, 424, 425, 850, 851])
def test_exactly_so_many_are_the_smallest(count):
  values = np.round(RNG.normal(size=(37, 23)), 1).astype(np.float32)  # with many equal ones
  found = np.asarray(smallest(jnp.asarray(values), jnp.int32(count)))
  order = np.argsort(values.reshape(-1), kind='stable')
  expected = np.zeros(values.size, bool)
  expected[order[:count]] = True
  np.testing.assert_array_equal(found.reshape(-1), expected)


def test_signs_and_zeros_are_ordered():
  values = jnp.array([0.0, -0.0, -1, 2, -3, jnp.inf, -jnp.inf])
  np.testing.assert_array_equal(np.flatnonzero(smallest(values, 4)), [0, 2, 4, 6])


@pytest.mark.parametrize('share', [0.0, 0.33, 0.9])
def test_merged_kernels_have_exactly_so_many_zeros(share):
  model, variables = vit()
  tuned, theta = attached(model, variables, pst(rank=2, score_rank=2), IMAGES)
  theta = with_share(theta, share)
  merged = tuned.merge(theta, variables)
  kernel = merged['params']['encoder']['block_1']['mlp']['fc1']['kernel']
  assert np.sum(np.asarray(kernel) == 0) == int(share * kernel.size)
  out = tuned.apply(theta, variables, IMAGES)
  np.testing.assert_allclose(model.apply(merged, IMAGES), out, atol=1e-5)


def test_a_pattern_leaves_so_many_of_each_group():
  x = jnp.ones((1, 8))
  tuned, variables = dense(RNG.normal(size=(5, 8)), x, pattern='2:4')
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.1)
  kernel = tuned.merge(with_share(theta, 0.01), variables)['params']['kernel']
  np.testing.assert_array_equal((kernel.reshape(2, 4, 5) != 0).sum(1), 2)
  kernel = tuned.merge(with_share(theta, 0.0), variables)['params']['kernel']
  assert np.all(kernel != 0)


def test_training_reaches_the_sparsity_and_leaves_the_backbone():
  model, variables = vit()
  method = pst(rank=2, score_rank=2, sparsity=0.8, targets='{fc1}')
  tuned = jpeft.attach(model, method, variables, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), variables)
  np.testing.assert_array_equal(
    tuned.apply(theta, variables, IMAGES), model.apply(variables, IMAGES)
  )
  tx = optax.adamw(1e-3, weight_decay=0.1)
  state = tx.init(tuned.split(theta)[0])

  @jax.jit
  def update(theta, state, number):
    trained, held = tuned.split(theta)
    grads = jax.grad(
      lambda p: jnp.sum(jnp.sin(tuned.apply(tuned.join(p, held), variables, IMAGES)))
    )(trained)
    updates, state = tx.update(grads, state, trained)
    new = tuned.join(optax.apply_updates(trained, updates), held)
    return tuned.edit(theta, new, state, grads, number + 1, jax.random.key(0), 10)

  shares = []
  for number in range(8):
    theta, state = update(theta, state, number)
    shares.append(float(theta['pst']['encoder/block_0/mlp/fc1']['kernel']['share']))
  np.testing.assert_allclose(shares, [share_at(step / 10, 0.8) for step in range(1, 9)], atol=1e-6)
  merged = tuned.merge(theta, variables)
  kernel = merged['params']['encoder']['block_1']['mlp']['fc1']['kernel']
  assert np.sum(np.asarray(kernel) == 0) == int(0.8 * kernel.size)
  bias = lambda tree: tree['params']['encoder']['block_1']['mlp']['fc1']['bias']
  np.testing.assert_array_equal(bias(merged), bias(variables))


@pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=['unrolled', 'scanned'])
def test_nothing_of_the_kernels_size_is_kept(fields):
  model, variables = vit(heads=2, mlp_dim=48, **fields)
  tuned = jpeft.attach(model, pst(rank=2, score_rank=2), variables, IMAGES)
  trained, held = tuned.split(tuned.shapes)
  kept = residuals(
    lambda p, held, variables, x: tuned.apply(tuned.join(p, held), variables, x),
    trained,
    held,
    variables,
    IMAGES,
    weights=(variables, trained, held),
  )
  sizes = {(32, 32), (32, 48), (48, 32)}
  assert kept and not [x.shape for x in kept if x.shape[-2:] in sizes]


def test_the_count_on_an_encoder_of_berts_size():
  bert = full_size.roberta_base()
  tuned = jpeft.attach(bert.model, pst(), *bert.shapes)
  assert jpeft.summary(tuned).trainable == 2_820_096
  tuned = jpeft.attach(bert.model, pst(4, 4), *bert.shapes)
  assert jpeft.summary(tuned).trainable == 1_492_992


def test_an_unknown_number_of_updates_is_refused():
  x = jnp.ones((1, 8))
  tuned, variables = dense(RNG.normal(size=(5, 8)), x)
  theta = tuned.init(jax.random.key(0), variables)
  trained, _ = tuned.split(theta)
  with pytest.raises(ValueError, match='pst: sparsity=0.[0-9]+ depends on how many updates'):
    tuned.edit(theta, theta, optax.adam(1e-3).init(trained), trained, 1, jax.random.key(0))


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 0}, 'pst: rank=0 must be a whole number'),
    ({'sparsity': 1.0}, r'pst: sparsity=1.0 must lie in \[0, 1\)'),
    ({'end': 0.05}, r'pst: end=0.05 must lie in \(begin=0.1, 1\]'),
    ({'pattern': '4:2'}, "pst: pattern='4:2' must be 'n:m' with 0 < n < m"),
    ({'alpha_1': -1}, 'pst: alpha_1=-1 must be at least 0'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    pst(**hyperparameters)


def test_groups_must_divide_the_inputs():
  with pytest.raises(ValueError, match="pst: pattern='2:4' needs inputs that divide by 4, not 6"):
    dense(RNG.normal(size=(5, 6)), jnp.ones((1, 6)), pattern='2:4')
