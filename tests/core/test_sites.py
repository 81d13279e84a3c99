"""What one traced forward pass shows of a model: paths, calls, how arrays are used, what is
stacked.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.core.stacks import stack_axes
from tests.contract.anatomies import described
from tests.core.small import Blocks, NnxBlocks, X, backbone
from tests.fixtures import BACKBONES, EDGES


def sites(name):
  b = (BACKBONES if name in BACKBONES else EDGES)[name]
  return jpeft.sites_of(b.model, b.backbone, *b.args, **b.kwargs)


# edge: {site: (axes, lengths, {array: (shape of one layer, use, ins, batch, outs)})}
DENSE_0 = {
  'kernel': ((16, 32), 'dot_general', (0,), (), (1,)),
  'bias': ((32,), 'add', (), (), (0,)),
}
DENSE_1 = {
  'kernel': ((32, 16), 'dot_general', (0,), (), (1,)),
  'bias': ((16,), 'add', (), (), (0,)),
}
NORM = {'scale': ((16,), 'mul', (), (), (0,)), 'bias': ((16,), 'add', (), (), (0,))}


def tiny(block, axes=(), lengths=()):
  return {
    f'{block}/LayerNorm_0': (axes, lengths, NORM),
    f'{block}/Dense_0': (axes, lengths, DENSE_0),
    f'{block}/Dense_1': (axes, lengths, DENSE_1),
    block: (axes, lengths, {}),
  }


WANT = {
  'linen_nested_scan': {**tiny('stage/block', (0, 1), (3, 2)), 'stage': ((0,), (3,), {})},
  'linen_scan_axis1': {**tiny('stack/block', (1,), (3,)), 'stack': ((), (), {})},
  'linen_vmap_ensemble': tiny('member', (0,), (3,)),
  'linen_jit_block': {**tiny('block_0'), **tiny('block_1')},
  'linen_shared': tiny('block'),
  'linen_partitioned': {
    'first/up': ((), (), DENSE_0),
    'first/down': ((), (), DENSE_1),
    'block/up': ((0,), (2,), DENSE_0),
    'block/down': ((0,), (2,), DENSE_1),
  },
  'linen_while_loop': {'': ((), (), {'kernel': ((16, 16), 'dot_general', (0,), (), (1,))})},
  'linen_moe': {
    '': (
      (),
      (),
      {
        'wi': ((4, 16, 32), 'dot_general', (1,), (0,), (2,)),
        'wo': ((4, 32, 16), 'dot_general', (0, 1), (), (2,)),
      },
    )
  },
  'linen_bare_root': {
    '': (
      (),
      (),
      {
        'gating_einsum': ((2, 16, 24), 'dot_general', (1,), (), (0, 2)),
        'linear': ((24, 16), 'dot_general', (0,), (), (1,)),
      },
    )
  },
  'nnx_jit': {'blocks/1/norm': ((), (), NORM), 'blocks/1/fc1': ((), (), DENSE_0)},
  'nnx_remat_method': {'blocks/0/fc1': ((), (), DENSE_0), 'blocks/1/fc2': ((), (), DENSE_1)},
  'nnx_batchnorm': {'bn': ((), (), NORM)},
  'nnx_shared': {'again/fc1': ((), (), DENSE_0), 'again/fc2': ((), (), DENSE_1)},
}


@pytest.mark.parametrize('name', WANT)
def test_sites_and_their_arrays(name):
  found = sites(name)
  for path, (axes, lengths, leaves) in WANT[name].items():
    site = found[path]
    assert (site.axes, site.lengths) == (axes, lengths), path
    got = {n: (l.shape, l.use, l.ins, l.batch, l.outs) for n, l in site.leaves.items()}
    assert got == leaves, path


@pytest.mark.parametrize(
  ('name', 'path', 'methods', 'inputs', 'out'),
  [
    ('linen_methods', 'coder', ('encode', 'decode'), ['x'], (2, 7, 8)),
    ('linen_methods', '', ('encode', 'decode', '__call__'), ['x'], (2, 7, 16)),
    ('nnx_methods', 'coder', ('encode', 'decode'), ['x'], (2, 7, 8)),
    ('nnx_methods', '', ('__call__',), ['features'], (2, 7, 8)),
    ('linen_many_outputs', '', ('__call__',), ['features'], (2, 7, 16)),
    ('linen_bert', 'encoder', ('__call__',), ['x', 'attention_mask'], (2, 10, 32)),
    ('linen_gemma', 'embedder', ('encode', 'decode'), ['tokens'], (2, 10, 32)),
    ('linen_vit_scan', 'Transformer/encoderblock', ('__call__',), ['inputs'], (2, 17, 32)),
  ],
  ids=lambda v: v if isinstance(v, str) else '',
)
def test_calls(name, path, methods, inputs, out):
  site = sites(name)[path]
  assert (site.methods, list(site.inputs), site.out.shape) == (methods, inputs, out)
  assert site.input == next(iter(site.inputs.values()))


@pytest.mark.parametrize(
  ('name', 'site', 'array', 'use', 'ins', 'outs', 'offset'),
  [
    ('linen_vit_scan', 'embedding', 'kernel', 'conv_general_dilated', (0, 1, 2), (3,), 0),
    (
      'linen_vit_scan',
      'Transformer/encoderblock/MultiHeadDotProductAttention_0/out',
      'kernel',
      'dot_general',
      (0, 1),
      (2,),
      0,
    ),
    ('linen_gemma', 'layers/attn/kv_einsum', 'w', 'dot_general', (2,), (0, 1, 3), 0),
    ('linen_gemma', 'layers/pre_ffw_norm', 'scale', 'mul', (), (0,), 1),
    ('linen_gemma', 'embedder', 'input_embedding', 'gather', (0,), (1,), 0),
  ],
  ids=lambda v: v if isinstance(v, str) else '',
)
def test_uses(name, site, array, use, ins, outs, offset):
  leaf = sites(name)[site].leaves[array]
  assert (leaf.use, leaf.ins, leaf.outs, leaf.offset) == (use, ins, outs, offset)
  x = jnp.arange(leaf.fan_in * leaf.fan_out).reshape(leaf.shape)
  assert leaf.fold(x).shape == (leaf.fan_in, leaf.fan_out)
  assert (leaf.unfold(leaf.fold(x)) == x).all()


def test_heads_are_seen_where_a_module_hands_out_its_attention():
  site = sites('linen_vit_scan')['Transformer/encoderblock/MultiHeadDotProductAttention_0']
  assert site.fields == ('attention_fn',) and site.heads == (4, 8)
  assert isinstance(site.module, nn.MultiHeadDotProductAttention) and site.module.parent is None
  assert sites('linen_gemma')['layers/attn'].heads is None


def test_shapes_will_do_and_nothing_is_computed():
  model = Blocks()
  held = backbone(model)
  shapes = jax.eval_shape(lambda: (held, X))
  found = jpeft.sites_of(model, *shapes)
  assert list(found) == list(jpeft.sites_of(model, held, X))
  assert jpeft.attach(model, jpeft.tune('block_1/fc'), *shapes).shapes == {
    'tune': {'block_1/fc': jax.eval_shape(lambda: held['params']['block_1']['fc'])}
  }


@pytest.mark.parametrize('make', [Blocks, NnxBlocks])
def test_order_is_that_of_the_forward_pass(make):
  model = make(12)
  found = [s.path for s in jpeft.sites_of(model, backbone(model), X).find('.*/fc')]
  assert [int(''.join(filter(str.isdigit, p))) for p in found] == list(range(12))


@pytest.mark.parametrize(
  ('outer', 'inner', 'axes'),
  [
    ([(3, 5), (3,)], [(5,), ()], (0,)),
    ([(5, 3), (5, 3, 7)], [(5,), (5, 7)], (1,)),
    ([(4, 4)], [(4,)], (0,)),
    ([(3, 2, 5)], [(5,)], (0, 1)),
    ([(7, 3), (2, 7, 3)], [(7,), (2, 7)], (-1,)),
    ([(5,)], [(5,)], ()),
  ],
)
def test_stack_axes(outer, inner, axes):
  assert stack_axes(outer, inner) == axes


def test_stack_axes_that_nothing_explains():
  with pytest.raises(ValueError, match='cannot tell which axes'):
    stack_axes([(3, 5)], [(4,)])


@pytest.mark.parametrize('name', BACKBONES)
def test_shapes_do_for_all_that_a_model_stores(name):
  b = BACKBONES[name]
  shapes = jax.eval_shape(lambda: b.backbone)
  with described(b):
    tuned = [
      jpeft.attach(b.model, jpeft.norm(), held, *b.args, **b.kwargs)
      for held in (b.backbone, shapes)
    ]
  assert tuned[0].shapes == tuned[1].shapes
  assert str(jpeft.summary(tuned[0])) == str(jpeft.summary(tuned[1]))
