"""Adam in 8 bits: its codes, how close it stays to Adam, stacks, small arrays, sizes, edits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import optim, programs
from jpeft.training.adam_8bit import BLOCK, SIGNED, UNSIGNED, coded, decoded, scale_by_adam_8bit
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

RNG = np.random.default_rng(0)


def test_the_codes_have_the_values_of_the_paper():
  """Those of create_dynamic_map(signed, max_exponent_bits=7, total_bits=8) of bitsandbytes."""
  for values, least in ((SIGNED, 5.5e-7), (UNSIGNED, 3.25e-7)):
    assert len(values) == len(set(values.tolist())) == 256 and values.max() == 1
    np.testing.assert_allclose(values[values > 0].min(), least, rtol=1e-6)
  assert SIGNED.min() == pytest.approx(-0.99296875) and (SIGNED < 0).sum() == 127
  assert UNSIGNED[0] == 0 and (np.diff(UNSIGNED) > 0).all()


@pytest.mark.parametrize('lead', [0, 1])
def test_a_number_is_coded_by_the_nearest_value_of_its_block(lead):
  x = (RNG.normal(size=(3, 7, 100)) * 10 ** RNG.uniform(-6, 0, (3, 7, 100))).astype('float32')
  codes, scale = coded(jnp.asarray(x), SIGNED, lead)
  assert codes.shape == x.shape and codes.dtype == jnp.uint8
  assert scale.shape == ((3, 3) if lead else (-(-x.size // BLOCK),))
  rows = x.reshape(3 if lead else 1, -1)
  want = []
  for row in rows:
    for start in range(0, row.size, BLOCK):
      block = row[start : start + BLOCK]
      unit = block / np.abs(block).max()
      nearest = SIGNED[np.abs(unit[:, None] - SIGNED).argmin(1)]
      want.append(nearest * np.abs(block).max())
  np.testing.assert_allclose(
    decoded(codes, scale, SIGNED).reshape(-1), np.concatenate(want), rtol=1e-5, atol=1e-9
  )


def test_sizes_that_are_not_0_stay_so_and_zeros_stay():
  x = jnp.asarray([0.0, 1e-30, 1e-9, 0.5, 1.0])
  back = decoded(*coded(x, UNSIGNED), UNSIGNED)
  assert back[0] == 0 and back[4] == 1 and (back[1:] > 0).all()
  zeros = jnp.zeros(300)
  assert not jnp.any(decoded(*coded(zeros, SIGNED), SIGNED))


def directions(tx, gradients):
  state = tx.init(gradients[0])
  update = jax.jit(tx.update)
  found = []
  for g in gradients:
    moved, state = update(g, state)
    found.append(moved)
  return found, state


@pytest.mark.parametrize(('decades', 'most'), [(1, 0.08), (4, 0.25)])
def test_its_steps_are_close_to_adams(decades, most):
  """After 50 updates, of blocks whose gradients have sizes over one or four powers of ten."""
  scale = (10 ** RNG.uniform(-decades, 0, (64, 100))).astype('float32')
  gradients = [jnp.asarray(RNG.normal(size=scale.shape) * scale, jnp.float32) for _ in range(50)]
  ours, _ = directions(scale_by_adam_8bit(), gradients)
  theirs, _ = directions(optax.scale_by_adam(), gradients)
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)  # nothing was coded before it
  error = np.linalg.norm(ours[-1] - theirs[-1]) / np.linalg.norm(theirs[-1])
  assert error < most
  assert np.abs(ours[-1]).max() < 2 * np.abs(theirs[-1]).max()


def test_small_arrays_follow_adam_to_the_bit():
  gradients = [jnp.asarray(RNG.normal(size=(4095,)), jnp.float32) for _ in range(5)]
  ours, state = directions(scale_by_adam_8bit(), gradients)
  theirs, _ = directions(optax.scale_by_adam(), gradients)
  np.testing.assert_allclose(ours[-1], theirs[-1], rtol=1e-5)
  assert state.mean.dtype == jnp.float32 and state.mean_scale is None


def wide(scan):
  """A model with kernels that are coded."""
  model, held = vit(width=64, mlp_dim=128, scan=scan)
  return jpeft.attach(model, jpeft.full(), held, IMAGES), held


def test_a_stack_is_coded_as_its_layers_are():
  tuned, _ = wide(True)
  path = 'full', 'encoder/blocks/mlp/fc1', 'kernel'
  gradients = [RNG.normal(size=(3, 64, 128)).astype('float32') for _ in range(3)]

  def tree(x):
    return {path[0]: {path[1]: {path[2]: jnp.asarray(x)}}}

  stacked, state = directions(optim.rule(tuned, 'adamw_8bit'), [tree(g) for g in gradients])
  assert jax.tree.leaves(state.mean_scale)[0].shape == (3, 64 * 128 // BLOCK)
  for layer in range(3):
    alone, _ = directions(scale_by_adam_8bit(), [jnp.asarray(g[layer]) for g in gradients])
    np.testing.assert_array_equal(jax.tree.leaves(stacked[-1])[0][layer], alone[-1])


def test_it_trains_under_one_compiled_step():
  tuned, held = wide(True)
  tx = optim.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-2), name='adamw_8bit')
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  loss = lambda theta: jnp.sum(jnp.sin(tuned.apply(theta, held, IMAGES)))

  @jax.jit
  def update(theta, state):
    updates, state = tx.update(jax.grad(loss)(theta), state, theta)
    return optax.apply_updates(theta, updates), state

  state = tx.init(theta)
  first = loss(theta)
  for _ in range(3):
    theta, state = update(theta, state)
  assert loss(theta) < first and update._cache_size() == 1


def test_the_state_of_vit_base_is_a_quarter_of_adams():
  images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  model = jpeft.models.ViT(
    width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, num_classes=10, scan=True
  )
  base = full_size.of(model, images)
  tuned = jpeft.attach(base.model, jpeft.full(), *base.shapes)

  def nbytes(name):
    tx = optim.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-3), name=name)
    return programs.nbytes(jax.eval_shape(tx.init, tuned.shapes))

  assert nbytes('adamw') / 2**20 == pytest.approx(654.6, abs=0.1)
  assert nbytes('adamw_8bit') / 2**20 == pytest.approx(166.2, abs=0.1)


def test_a_method_that_edits_moments_is_refused():
  model, held = vit(width=64, mlp_dim=128)
  edits = jpeft.attach(model, jpeft.lamda(64), held, IMAGES)
  theta = jax.jit(edits.init)(jax.random.key(0), held)
  trained, _ = edits.split(theta)
  tx = optim.optimizer(edits, edits.shapes, optax.constant_schedule(1.0), name='adamw_8bit')
  with pytest.raises(ValueError, match='the optimizer keeps codes of uint8 for'):
    edits.edit(theta, theta, tx.init(trained), trained, 1, jax.random.key(0), 10)
