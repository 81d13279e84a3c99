"""SNELL: the worked example, gradients, what is kept, ranks, counts of the paper, and memory."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight.snell import chosen, distances, factors, left_out, snell
from tests.fixtures import noisy
from tests.kept import residuals
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

P = jnp.array([[[1.0], [0]], [[0], [2]]])
Q = jnp.array([[[0.0], [2]], [[1], [1]]])
EQUAL = {name: jnp.broadcast_to(x[:1], x.shape) for name, x in {'p': P, 'q': Q}.items()}
RNG = np.random.default_rng(0)
VALUES = jnp.asarray(RNG.normal(size=(37, 23)), jnp.float32)


def dense(m=5, n=4, x=None, **hyperparameters):
  """(tuned, variables, x) of one Dense layer."""
  x = jnp.asarray(RNG.normal(size=(3, m)), jnp.float32) if x is None else x
  model = nn.Dense(n)
  variables = model.init(jax.random.key(0), x)
  return jpeft.attach(model, snell(targets='', **hyperparameters), variables, x), variables, x


def test_the_worked_example():
  found = distances(P, Q)
  np.testing.assert_allclose(found, [[0, 0], [-0.1, 0.1]], atol=1e-8)
  assert jnp.quantile(jnp.abs(found), 0.5) == pytest.approx(0.05)
  count = left_out(0.5, 2, 2)
  for soft in (False, True):  # the magnitude of rank 2 is 0
    delta = chosen(found, count, soft)
    np.testing.assert_allclose(delta, [[0, 0], [-0.01, 0.01]], atol=1e-8)


@pytest.mark.parametrize('sparsity', [0.001, 0.1, 0.5, 0.74, 0.9, 0.995, 0.9999])
def test_the_share_left_out_is_that_of_the_interpolated_quantile(sparsity):
  delta = chosen(VALUES, left_out(sparsity, *VALUES.shape))
  magnitude = jnp.abs(VALUES)
  threshold = jnp.quantile(magnitude, sparsity)
  np.testing.assert_array_equal(delta != 0, magnitude > threshold)
  np.testing.assert_allclose(delta, VALUES * jnp.where(delta != 0, magnitude, 0), rtol=1e-6)
  assert abs(jnp.mean(delta == 0) - sparsity) <= 1 / VALUES.size


def test_equal_magnitudes_go_together():
  values = jnp.array([[1.0, -1], [2, -2]])
  kept = [int(jnp.sum(chosen(values, count) != 0)) for count in range(5)]
  assert kept == [4, 2, 2, 0, 0]


def test_the_papers_rule_subtracts_a_magnitude():
  ordered = jnp.sort(jnp.abs(VALUES).reshape(-1))
  for count in (1, 100, 850):
    expected = VALUES * jnp.maximum(jnp.abs(VALUES) - ordered[count - 1], 0)
    np.testing.assert_allclose(chosen(VALUES, count, soft=True), expected, rtol=1e-6)


def test_the_factor_is_a_constant_for_gradients():
  upstream = jnp.asarray(RNG.normal(size=VALUES.shape), jnp.float32)
  count = left_out(0.6, *VALUES.shape)
  grad = jax.grad(lambda d: jnp.sum(upstream * chosen(d, count)))(VALUES)
  factor = jnp.where(chosen(VALUES, count) != 0, jnp.abs(VALUES), 0)
  np.testing.assert_allclose(grad, upstream * factor, rtol=1e-6)
  assert jnp.mean(grad == 0) == pytest.approx(0.6, abs=1 / VALUES.size)


def test_gradients_of_the_distances():
  p, q = (jnp.asarray(RNG.normal(size=(2, size, 3)), jnp.float32) for size in (5, 4))
  upstream = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
  grads = jax.grad(lambda p, q: jnp.sum(upstream * distances(p, q)), (0, 1))(p, q)
  apart = p[:, :, None] - q[:, None]  # [2, m, n, k]
  steps = 0.1 * apart / jnp.linalg.norm(apart, axis=-1, keepdims=True) * upstream[..., None]
  signed = steps * jnp.array([1.0, -1])[:, None, None, None]
  np.testing.assert_allclose(grads[0], signed.sum(2), atol=1e-6)
  np.testing.assert_allclose(grads[1], -signed.sum(1), atol=1e-6)


@pytest.mark.parametrize('sparsity', [0.0, 0.5])
def test_recomputation_changes_no_number(sparsity):
  tuned, variables, x = dense(6, 8, rank=4, sparsity=sparsity)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.5)

  def whole(theta):
    t = theta['snell']['']['kernel']
    values = distances(t['p'], t['q'])
    delta = chosen(values, left_out(sparsity, *values.shape)) if sparsity else values
    kernel = variables['params']['kernel'] + delta
    return x @ kernel + variables['params']['bias']

  ours = lambda theta: tuned.apply(theta, variables, x)
  np.testing.assert_allclose(ours(theta), whole(theta), atol=1e-6)
  grads = [jax.grad(lambda t, fn=fn: jnp.sum(jnp.sin(fn(t))))(theta) for fn in (ours, whole)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *grads)


@pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=['unrolled', 'scanned'])
def test_nothing_of_the_kernels_size_is_kept(fields):
  model, variables = vit(heads=2, mlp_dim=48, **fields)
  tuned = jpeft.attach(model, snell(rank=4), variables, IMAGES)
  kept = residuals(tuned.apply, tuned.shapes, variables, IMAGES, weights=(variables, tuned.shapes))
  sizes = {(32, 32), (32, 48), (48, 32)}
  assert kept and not [x.shape for x in kept if x.shape[-2:] in sizes]


def vit_base(**fields):
  shapes = jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.float32)
  model = jpeft.models.ViT(
    width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, num_classes=10, **fields
  )
  return full_size.of(model, shapes)


@pytest.mark.parametrize('rank', [8, 16, 32])
def test_the_counts_on_vit_base(rank):
  base = vit_base(scan=True)
  tuned = jpeft.attach(base.model, snell(rank), *base.shapes)
  assert jpeft.summary(tuned).trainable == 165_888 * rank
  if rank > 8:
    return
  assert 165_888 * rank == 1_327_104
  token = jpeft.tune('embed', 'cls', 'token')
  with_token = jpeft.attach(base.model, jpeft.chain(snell(rank), token), *base.shapes)
  assert jpeft.summary(with_token).trainable == 1_327_104 + 768


def test_distances_have_a_rank_beyond_that_of_the_factors():
  t = factors(jax.random.key(0), (768, 768), 8)
  assert jnp.linalg.matrix_rank(distances(t['p'], t['q']), rtol=1e-4) > 8


def test_merged_weights_are_the_same_function():
  model, variables = vit()
  tuned = jpeft.attach(model, snell(rank=4), variables, IMAGES)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.3)
  out = tuned.apply(theta, variables, IMAGES)
  assert np.abs(out - model.apply(variables, IMAGES)).max() > 1e-2
  merged = tuned.merge(theta, variables)
  np.testing.assert_allclose(model.apply(merged, IMAGES), out, atol=1e-5)


@pytest.mark.parametrize('sparsity', [0.0, 0.5])
def test_equal_halves_are_the_backbone_with_finite_gradients(sparsity):
  tuned, variables, x = dense(2, 2, rank=2, sparsity=sparsity)
  theta = {'snell': {'': {'kernel': EQUAL}}}
  plain = nn.Dense(2).apply(variables, x)
  np.testing.assert_array_equal(tuned.apply(theta, variables, x), plain)
  grads = jax.grad(lambda t: jnp.sum(tuned.apply(t, variables, x) ** 2))(theta)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_an_equal_start_is_the_backbone_and_learns():
  tuned, variables, x = dense(rank=4, sparsity=0.0, init='equal')
  theta = tuned.init(jax.random.key(0), variables)
  np.testing.assert_array_equal(tuned.apply(theta, variables, x), nn.Dense(4).apply(variables, x))
  grads = jax.grad(lambda t: jnp.sum(tuned.apply(t, variables, x) ** 2))(theta)
  assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('shape', [(768, 768), (768, 3072), (3072, 768)])
def test_a_sparse_update_starts_near_zero(shape):
  t = factors(jax.random.key(0), shape, 8)
  bounds = [(size * 4) ** -0.5 for size in shape]
  for part, bound in zip('pq', bounds, strict=True):
    assert 0.99 * bound < jnp.abs(t[part]).max() <= bound
  delta = chosen(distances(t['p'], t['q']), left_out(0.1, *shape))
  assert 0 < jnp.abs(delta).max() < 1e-4


def test_dropout_thins_the_update_alone():
  x = jnp.asarray(RNG.normal(size=(64, 5)), jnp.float32)
  plain = nn.Dense(4)
  for rates, whole_rows in (({'dropout': 0.5}, False), ({'path_dropout': 0.5}, True)):
    tuned, variables, _ = dense(x=x, rank=4, sparsity=0.0, **rates)
    theta = noisy(tuned.init(jax.random.key(0), variables), 0.5)
    base = plain.apply(variables, x)
    sure = tuned.apply(theta, variables, x) - base
    update = tuned.apply(theta, variables, x, rngs={'dropout': jax.random.key(0)}) - base
    without = jnp.all(jnp.abs(update) < 1e-6, -1)
    if whole_rows:
      assert 10 < without.sum() < 54
      np.testing.assert_allclose(update[~without], 2 * sure[~without], atol=1e-5)
    else:
      assert without.sum() < 10 and jnp.abs(update - sure).max() > 0.1


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 3}, 'snell: rank=3 must be even'),
    ({'rank': 0}, 'snell: rank=0 must be a whole number, at least 2'),
    ({'sparsity': 1.0}, r'snell: sparsity=1.0 must lie in \[0, 1\)'),
    ({'dropout': 1.5}, r'snell: dropout=1.5 must lie in \[0, 1\]'),
    ({'path_dropout': -1}, r'snell: path_dropout=-1 must lie in \[0, 1\]'),
    ({'soft': True, 'sparsity': 0}, 'snell: soft=True subtracts a threshold, and sparsity=0 has'),
    ({'init': 'zero'}, "snell: init='zero' must be 'default' or 'equal'"),
    ({'init': 'equal'}, 'snell: init=.* without a gradient: set sparsity=0'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    snell(**hyperparameters)


@pytest.fixture(scope='module')
def planned():
  """planned(method, remat) -> its Plan on ViT-B for a TPU v5e, each compiled once."""
  pytest.importorskip('libtpu')

  @functools.cache
  def made(method, remat):
    base = vit_base(scan=True, remat=remat)
    batch = {'image': base.shapes[1], 'label': jax.ShapeDtypeStruct((32,), jnp.int32)}
    return jpeft.plan(base.model, method, batch, target='tpu:v5e')[0]

  return made


@pytest.mark.aot
@pytest.mark.parametrize('remat', [False, True], ids=['kept', 'remat'])
@pytest.mark.parametrize('method', ['snell', 'snella'])
def test_a_step_needs_the_memory_of_lora(planned, method, remat):
  """At the same rank in the same layers."""
  found = planned(jpeft.make(method, head=False, rank=8), remat)
  lora = planned(jpeft.lora(8, targets='{linear}'), remat)
  assert found.exact and lora.exact
  assert found.total <= 1.1 * lora.total
  assert found.optimizer <= lora.optimizer + 2 * 4 * 216  # three more numbers a kernel
