"""Where arrays are on a mesh of 8 devices, and that every layout gives the numbers of one device.

Adam divides by the size of a gradient, so that rounding of 1e-7 becomes a whole step where the
gradient is about that small. With eps=1e-2 a step follows the gradient, and so do its errors.

theta is also compared to how far it has moved: QST moves little in a few updates.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jpeft
from jpeft import programs, training
from jpeft.core import backend_of, dot_product
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES
from tests.params import fast_if
from tests.training.decoders import (
  LENGTH,
  METHODS,
  ROWS,
  WORDS,
  Shape,
  distance,
  named,
  prepared,
  work_of,
)

MESHES = ((8, 1), (4, 2), (2, 4))


def shapes_of(kind, mesh, backbone, **changes):
  """(state, backbone) as shapes with their shardings, and the layout."""
  work, tuned = work_of(kind, mesh, backbone, **changes)
  tx = training.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-2))
  devices = training.mesh(*mesh)
  state = training.state_shapes(tuned, tx, work.variables)
  state, variables, _ = work.placed(tuned, devices, state, ROWS)
  return state, variables, work.layout(tuned, devices)


def assert_same(many, one):
  for spread, alone in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-5)


# Every method on every mesh in every layout; two of them are quick, as other tests need their
# programs too.
CELLS = list(itertools.product(METHODS, MESHES, training.BACKBONES))
QUICK = (('qlora', (4, 2), 'sharded'), ('full', (4, 2), 'fsdp'))


@functools.cache
def begun_and_trained(kind):
  """theta before and after 16 updates on one device."""
  alone = prepared(kind, (1, 1), 'replicated')
  return alone.trained(0), alone.trained(16)


def is_quick(*cell):
  return cell in QUICK


@pytest.mark.parametrize(('kind', 'mesh', 'backbone'), fast_if(is_quick, CELLS, named))
def test_every_layout_trains_as_one_device(kind, mesh, backbone):
  begun, one = begun_and_trained(kind)
  many = prepared(kind, mesh, backbone).trained(16)
  assert_same(many, one)
  assert distance(many, one) < 1e-5 * distance(one, begun)


# What a layout sends within a layer: sums of activations, gathered activations (those of 4-bit
# kernels, which are cut by columns), sums of the gradient, and layers of what the data axis cuts.
SENT = {
  'sharded': {
    ('all-reduce', ('model',)),
    ('all-gather', ('model',)),
    ('all-reduce', ('data',)),
  },
  'fsdp': {
    ('all-reduce', ('model',)),
    ('all-gather', ('data',)),
    ('all-reduce', ('data',)),
    ('reduce-scatter', ('data',)),
  },
}


def sent_in_loops(update):
  """The collectives of an update that a layer makes."""
  sent = programs.collectives(update.program, update.layout.mesh.shape)
  return [one for one in sent if one.loops]


@pytest.mark.parametrize(('kind', 'backbone'), [('qlora', 'sharded'), ('full', 'fsdp')])
def test_layers_send_what_their_layout_names(kind, backbone):
  found = sent_in_loops(prepared(kind, (4, 2), backbone))
  assert {(one.kind, one.axes) for one in found} <= SENT[backbone]
  stream = ROWS // 4 * LENGTH * 64 * 4
  hidden = ROWS // 4 * LENGTH * 128 * 4
  sums = [one for one in found if one.kind == 'all-reduce' and one.axes == ('model',)]
  if backbone == 'sharded':  # no kernel is gathered, and no norm is computed in parts
    gathered = [one.bytes for one in found if one.kind == 'all-gather']
    assert sorted(gathered) == [stream] * 4 + [hidden]  # o, fc2: what they read and return
    assert min(one.bytes for one in sums) >= stream
  else:
    assert sum(one.bytes // stream for one in sums) == 2 + 2 + 3  # o, fc2; gate, fc1; q, k, v
    gathered = sum(one.rounds * one.bytes for one in found if one.kind == 'all-gather')
    kernels = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * 4 // 2  # half of them a device
    assert gathered == 2 * kernels  # forwards and backwards


LONG_CONTEXTS = [
  ('lora', (4, 2), 'sharded'),
  ('qlora', (4, 2), 'sharded'),
  ('saved_bits', (2, 4), 'sharded'),
  ('meft', (2, 4), 'sharded'),
  ('qst', (4, 2), 'sharded'),
  ('lst', (2, 4), 'fsdp'),
  ('full', (4, 2), 'fsdp'),
]


def is_lora(kind, mesh, backbone):
  return kind == 'lora'


@pytest.mark.parametrize(('kind', 'mesh', 'backbone'), fast_if(is_lora, LONG_CONTEXTS, named))
def test_long_contexts_are_cut_by_heads(kind, mesh, backbone, monkeypatch):
  """No query, key or value is gathered, and the updates are those of one device."""
  monkeypatch.setattr(dot_product, 'LONG', 0)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 2 * LENGTH * LENGTH)
  # Not from the cache, which has programs of short contexts.
  many = prepared.__wrapped__(kind, mesh, backbone)
  found = sent_in_loops(many)
  if kind == 'lora':
    assert {one.kind for one in found} == {'all-reduce'}, found
  assert {one.loops for one in found} == {1}  # none in the loops of a layer's attention
  alone = prepared.__wrapped__(kind, (1, 1), 'replicated')
  one = alone.trained(16)
  assert distance(many.trained(16), one) < 1e-5 * distance(one, alone.trained(0))


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('backbone', training.BACKBONES)
def test_theta_and_optimizer_take_their_share(mesh, backbone):
  state, _, _ = shapes_of('full', mesh, backbone)
  for part in ('theta', 'optimizer'):
    matrices = [x for x in jax.tree.leaves(state[part]) if x.size >= 64 * WORDS]
    whole = sum(x.dtype.itemsize * math.prod(x.shape) for x in matrices)
    assert programs.nbytes(matrices) == whole / 8
    vectors = programs.nbytes(state[part]) - programs.nbytes(matrices)
    assert vectors < 0.02 * whole


@pytest.mark.parametrize('kind', ('qlora', 'lora'))
def test_layers_are_never_cut_apart(kind):
  for backbone in ('sharded', 'fsdp'):
    state, variables, _ = shapes_of(kind, (2, 4), backbone)
    blocks = variables['params']['decoder']['blocks']
    for x in jax.tree.leaves((blocks, state['theta'])):
      assert x.sharding.spec[:1] in ((), (None,))
    if kind == 'qlora':  # codes and scales are cut by the same columns
      box = blocks['attention']['out']['kernel'].arrays
      assert box['codes'].sharding.spec == box['absmax'].sharding.spec
      names = {'sharded': 'model', 'fsdp': ('model', 'data')}[backbone]
      assert box['codes'].sharding.spec[-1] == names


def test_kernels_are_cut_by_their_roles():
  _, variables, layout = shapes_of('lora', (2, 4), 'sharded')
  params = variables['params']
  blocks = params['decoder']['blocks']

  def axis(x):
    return [i for i, names in enumerate(x.sharding.spec) if names]

  assert [axis(blocks['attention'][name]['kernel']) for name in ('query', 'key', 'out')] == [
    [2],
    [2],
    [1],
  ]
  assert [axis(blocks['mlp'][name]['kernel']) for name in ('fc1', 'gate', 'fc2')] == [[2], [2], [1]]
  assert axis(params['embed']['embedding']) == [0] and axis(params['head']['kernel']) == [1]
  assert axis(blocks['norm1']['scale']) == [] and layout.exceptions() == []


def test_what_is_not_cut_by_its_role_is_said():
  _, variables, layout = shapes_of('lora', (2, 4), 'sharded', shape=Shape(kv_heads=2))
  assert layout.exceptions() == [
    'cut by rows, as model=4 does not divide the key heads: decoder/blocks/attention/key/kernel, '
    'decoder/blocks/attention/value/kernel'
  ]
  kernels = variables['params']['decoder']['blocks']['attention']
  assert tuple(kernels['query']['kernel'].sharding.spec) == (None, None, 'model')
  assert tuple(kernels['key']['kernel'].sharding.spec) == (None, 'model', None)


def test_codes_that_are_not_cut_by_rows_are_said():
  _, variables, layout = shapes_of('qlora', (2, 4), 'sharded')
  assert layout.exceptions() == [
    'cut by columns, as rows of 4-bit codes cannot be cut: what they read and return is gathered: '
    'decoder/blocks/attention/out/kernel, decoder/blocks/mlp/fc2/kernel'
  ]
  box = variables['params']['decoder']['blocks']['mlp']['fc2']['kernel']
  assert box.arrays['codes'].sharding.spec == PartitionSpec(None, None, 'model')


def test_small_arrays_are_whole():
  state, variables, _ = shapes_of('full', (4, 2), 'fsdp', whole_below=64 * 128)
  kernels = variables['params']['decoder']['blocks']
  assert not kernels['mlp']['fc1']['kernel'].sharding.is_fully_replicated
  assert kernels['attention']['query']['kernel'].sharding.is_fully_replicated
  theta = state['theta']['full']
  assert theta['decoder/blocks/attention/query']['kernel'].sharding.is_fully_replicated
  assert not theta['decoder/blocks/mlp/fc1']['kernel'].sharding.is_fully_replicated


@pytest.mark.parametrize(
  'name', ('linen_bert', 'linen_gemma', 'linen_cnn', 'nnx_vit_scan', 'nnx_raw')
)
def test_any_model_is_placed_and_computes_the_same(name):
  b = BACKBONES[name]
  with described(b):
    tuned = jpeft.attach(b.model, jpeft.tune('.*'), b.backbone, *b.args, **b.kwargs)
  theta = tuned.init(jax.random.key(0), b.backbone)
  layout = training.Layout(tuned, training.mesh(2, 4), 'fsdp', 1)
  placed = jax.device_put(b.backbone, layout.of_backbone(b.backbone))
  state = {'theta': theta, 'optimizer': optax.EmptyState()}
  spread = jax.device_put(theta, layout.of_state(state)['theta'])
  cut = [x for x in jax.tree.leaves(placed) if not x.sharding.is_fully_replicated]
  assert cut and any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread))
  for path, site in tuned.sites.items():
    for name in site.leaves:
      x = backend_of(b.model).arrays(b.model, placed)[f'{path}/{name}' if path else name]
      spec = (*x.sharding.spec, *[None] * x.ndim)
      assert all(spec[axis % x.ndim] is None for axis in site.axes)
  steered = layout.steered(tuned)
  run = jax.jit(lambda theta, backbone: steered.apply(theta, backbone, *b.args, **b.kwargs))
  assert_same(run(spread, placed), tuned.apply(theta, b.backbone, *b.args, **b.kwargs))


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
  saved = prepared('full', (4, 2), 'fsdp').state
  work, tuned = work_of('full', (2, 4), 'sharded')
  layout = work.layout(tuned, training.mesh(2, 4))
  like = jax.device_put(jax.tree.map(jnp.zeros_like, saved), layout.of_state(saved))
  checkpoints = training.Checkpoints(tmp_path / 'checkpoints', keep=1)
  checkpoints.save(3, saved, {'seconds': 1.0})
  checkpoints.wait()
  found, about = checkpoints.restore(like)
  checkpoints.close()
  assert about['seconds'] == 1.0
  for x, old, there in zip(*map(jax.tree.leaves, (found, saved, like)), strict=True):
    np.testing.assert_array_equal(x, old)
    assert x.sharding == there.sharding
  # One file, wherever the arrays were.
  files = []
  for name, theta in (('a', saved['theta']), ('b', found['theta'])):
    training.save_theta(tmp_path / name, theta, step=3)
    files.append((tmp_path / name).read_bytes())
  assert files[0] == files[1]
