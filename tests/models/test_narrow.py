"""A narrow model is the wide one with zeros in the cut places, or without the dropped blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jpeft
from jpeft import Keep, models
from jpeft.programs import flops

IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 20)
TARGETS = jax.random.randint(jax.random.key(2), (2, 5), 0, 20)
VIT = functools.partial(
  models.ViT, 16, 3, 4, 12, patch_size=8, image_size=16, num_classes=3, layer_scale=0.5
)
BERT = functools.partial(models.Bert, 16, 3, 4, 12, vocab=20, positions=9, num_classes=3)
# Heads narrower than the width over their number, encoder and decoder of different depths.
T5 = functools.partial(models.T5, 16, 3, 4, 12, 20, head_dim=3, decoder_depth=2)
LLAMA = functools.partial(models.Llama, 16, 3, 8, 12, 20, kv_heads=4)
MODELS = {
  'vit': (VIT, (IMAGES,)),
  'bert': (BERT, (TOKENS,)),
  't5': (T5, (TOKENS, TARGETS)),
  't5_gated': (functools.partial(T5, gated=True, tied=False), (TOKENS, TARGETS)),
  'llama': (functools.partial(LLAMA, tied=True), (TOKENS,)),
  'qwen': (
    functools.partial(LLAMA, head_dim=4, qk_norm=True, qkv_bias=True, mlp_bias=True),
    (TOKENS,),
  ),
}
# What stays: as much of each layer in other places, the same heads of each, or different numbers.
ALIKE = {
  'heads': {0: (0, 2), 1: (1, 3), 2: (0, 2)},
  'mlp': {0: (0, 1, 5, 7), 1: (2, 3, 10, 11), 2: (4, 5, 6, 7)},
}
SAME = {'heads': dict.fromkeys(range(3), (1, 3)), 'mlp': ALIKE['mlp']}
UNEQUAL = {'heads': {0: (3,), 2: (0, 1, 3)}, 'mlp': {1: (0, 4, 8), 2: (11,)}}


@functools.cache
def made(name, scan=False):
  """(model, its variables, all of them random, inputs)."""
  make, inputs = MODELS[name]
  model = make(scan=scan)
  variables = jax.jit(model.init)(jax.random.key(3), *inputs)
  rng = np.random.default_rng(4)
  variables = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype('f'), variables)
  return model, variables, inputs


def keep_of(name, cuts):
  """A `Keep` with these cuts; the decoder of a T5 is cut in the same places."""
  if not name.startswith('t5'):
    return Keep(**cuts)
  decoder = {key: {n: kept for n, kept in cut.items() if n < 2} for key, cut in cuts.items()}
  return Keep(**cuts, decoder=Keep(**decoder, cross_heads={1: (2,)} if cuts is UNEQUAL else {}))


def outputs(model, variables, inputs):
  return np.asarray(jax.jit(model.apply)(variables, *inputs))


def cost(model, variables, inputs):
  return flops(jax.jit(model.apply).trace(variables, *inputs)).all


def zeroed(model, variables, keep):
  """The variables with zeros in the places that `keep` cuts."""
  flat = traverse_util.flatten_dict(variables['params'], sep='/')
  stacks = {'encoder': keep, 'decoder': keep.decoder}
  if isinstance(model, models.Llama):
    stacks = {'decoder': keep}
  new = {}
  for path, x in flat.items():
    x = np.array(x)
    stack, _, rest = path.partition('/')
    if rest.startswith('block'):
      block, _, local = rest.partition('/')
      numbers = range(len(x)) if model.scan else [int(block.removeprefix('block_'))]
      for number, layer in zip(numbers, x if model.scan else [x], strict=True):
        zero(layer, local, stacks[stack], number)
    new[path] = jnp.asarray(x)
  return {'params': traverse_util.unflatten_dict(new, sep='/')}


def zero(x, local, part, number):
  """Puts zeros into an array of one layer, in place."""
  module, _, name = local.partition('/')
  kept = {'attention': part.heads, 'cross_attention': part.cross_heads, 'mlp': part.mlp}
  outer = name in ('out/bias', 'fc2/bias') or 'norm' in name
  if module not in kept or number not in kept[module] or outer:
    return
  parts = 12 if module == 'mlp' else 4
  cut = np.setdiff1d(np.arange(parts), kept[module][number])
  if name in ('out/kernel', 'fc2/kernel'):
    x.reshape(parts, -1, x.shape[-1])[cut] = 0
  else:
    x.reshape(*x.shape[:-1], parts, -1)[..., cut, :] = 0


@pytest.mark.parametrize('cuts', [ALIKE, SAME, UNEQUAL], ids=['alike', 'same', 'unequal'])
@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', MODELS)
def test_a_narrow_model_is_the_wide_one_with_zeros(name, scan, cuts):
  model, variables, inputs = made(name, scan)
  keep = keep_of(name, cuts)
  narrow, small = jpeft.narrowed(model, variables, keep)
  # Blocks of a T5 share a position bias, so that a scan needs the same heads in each.
  assert narrow.scan == (scan and (cuts is SAME or cuts is ALIKE and not name.startswith('t5')))
  want = outputs(model, zeroed(model, variables, keep), inputs)
  got = outputs(narrow, small, inputs)
  assert np.abs(want - outputs(model, variables, inputs)).max() > 1e-2
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  assert jpeft.nbytes(small) < jpeft.nbytes(variables)
  shapes = jax.eval_shape(narrow.init, jax.random.key(0), *inputs)
  assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, shapes)
  assert cost(narrow, small, inputs) < cost(model, variables, inputs)
