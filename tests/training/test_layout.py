"""Where arrays are on a mesh of 8 devices, and that every layout gives the numbers of one device.

Adam divides by the size of a gradient, so that rounding of 1e-7 becomes a whole step where the
gradient is about that small. With eps=1e-2 a step follows the gradient, and so do its errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import quant, training
from jpeft.models import Llama
from jpeft.planning import Work

MESHES = ((8, 1), (4, 2), (2, 4))
ROWS, LENGTH, WORDS = 8, 8, 48
METHODS = {
  'lora': ('lora', None, None),
  'qlora': ('lora', 'nf4', None),
  'qst': ('qst', 'nf4', None),
  'lst': ('lst', None, None),
  'saved_bits': ('lora', None, 4),
  'meft': ('meft', None, None),
  'full': ('full', None, None),
}


def work_of(kind, mesh, backbone, whole_below=1, scan=True, kv_heads=4):
  """(work, tuned) of a method on a decoder of two layers."""
  name, storage, saved_bits = METHODS[kind]
  model = Llama(64, 2, 8, 128, WORDS, kv_heads=kv_heads, tied=False, scan=scan)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8), jnp.int32))
  if storage:
    tokens = jnp.ones((1, LENGTH), jnp.int32)
    variables = quant.quantize(model, quant.named(storage), variables, tokens)
  names = ('tokens', 'token_mask', 'label')

  def batch(size):
    return {name: jax.ShapeDtypeStruct((size, LENGTH), jnp.int32) for name in names}

  work = Work(model, variables, batch, ROWS, mesh=mesh, backbone=backbone, whole_below=whole_below)
  more = {} if saved_bits is None else {'saved_bits': saved_bits}
  return work, work.tuned(jpeft.make(name, head=False, **more))


def prepared(kind, mesh, backbone, **changes):
  """(program of an update, state, backbone on its devices, layout)."""
  work, tuned = work_of(kind, mesh, backbone, **changes)
  tx = training.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-2), eps=1e-2)
  devices = training.mesh(*mesh)
  layout = work.layout(tuned, devices)
  shapes = training.state_shapes(tuned, tx, work.variables)
  placed = work.placed(tuned, devices, shapes, ROWS)
  program, _ = training.fitting(work.step(tuned, tx, devices), *placed)
  arrays = jax.device_put(work.variables, layout.of_backbone(work.variables))
  where = layout.of_state(shapes)
  state = training.initial_state(tuned, tx, arrays, 0, shardings=where)
  return program, state, arrays, layout


def trained(kind, mesh, backbone, updates, **changes):
  """theta after some updates."""
  program, state, arrays, layout = prepared(kind, mesh, backbone, **changes)
  rng = np.random.default_rng(1)
  for _ in range(updates):
    tokens = rng.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32)
    batch = {'tokens': tokens, 'token_mask': np.ones_like(tokens), 'label': np.roll(tokens, -1, 1)}
    state, _ = program(state, arrays, jax.device_put(batch, training.over_data(layout.mesh)))
  return jax.device_get(state['theta'])


def assert_same(many, one):
  for spread, alone in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('kind', 'backbone'), [('qlora', 'sharded'), ('full', 'fsdp')])
def test_updates_on_eight_devices_are_those_of_one(kind, backbone):
  one = trained(kind, (1, 1), 'replicated', 3)
  assert_same(trained(kind, (4, 2), backbone, 3), one)


@pytest.mark.slow
@pytest.mark.parametrize('kind', METHODS)
def test_every_layout_trains_as_one_device(kind):
  one = trained(kind, (1, 1), 'replicated', 16)
  for mesh in MESHES:
    for backbone in training.BACKBONES:
      assert_same(trained(kind, mesh, backbone, 16), one)
