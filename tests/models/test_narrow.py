"""A narrow model is the wide one with zeros in the cut places, or without the dropped blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jpeft
from jpeft import Keep, models
from jpeft.decoding import generate
from jpeft.programs import flops
from tests.models.goldens import CAUSAL, GOLDEN, NAMES

IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 20)
TARGETS = jax.random.randint(jax.random.key(2), (2, 5), 0, 20)
VIT = functools.partial(
  models.ViT,
  16,
  3,
  heads=4,
  mlp_dim=12,
  patch_size=8,
  image_size=16,
  num_classes=3,
  layer_scale=0.5,
)
BERT = functools.partial(models.Bert, 16, 3, 4, 12, vocab=20, positions=9, num_classes=3)
# Heads narrower than the width over their number, encoder and decoder of different depths.
T5 = functools.partial(models.T5, 16, 3, heads=4, mlp_dim=12, vocab=20, head_dim=3, decoder_depth=2)
LLAMA = functools.partial(models.Llama, 16, 3, 8, 12, 20, kv_heads=4)
MODELS = {
  'vit': (VIT, (IMAGES,)),
  'beit': (functools.partial(VIT, position_bias='own', norm_pooled=True, pool='mean'), (IMAGES,)),
  'beit_shared': (functools.partial(VIT, position_bias='shared', position=False), (IMAGES,)),
  'dinov3': (functools.partial(VIT, rope_theta=10.0, position=False, gated=True), (IMAGES,)),
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
  # Where blocks share a position bias, a scan needs the same heads in each.
  shares = name.startswith('t5') or name == 'beit_shared'
  assert narrow.scan == (scan and (cuts is SAME or cuts is ALIKE and not shares))
  want = outputs(model, zeroed(model, variables, keep), inputs)
  got = outputs(narrow, small, inputs)
  assert np.abs(want - outputs(model, variables, inputs)).max() > 1e-2
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  assert jpeft.nbytes(small) < jpeft.nbytes(variables)
  shapes = jax.eval_shape(narrow.init, jax.random.key(0), *inputs)
  assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, shapes)
  assert cost(narrow, small, inputs) < cost(model, variables, inputs)


@pytest.mark.parametrize('name', MODELS)
def test_dropped_blocks_are_gone_and_the_others_stay(name):
  model, variables, inputs = made(name)
  keep = Keep(layers=(0, 2), decoder=Keep(layers=np.array([1])) if name.startswith('t5') else None)
  narrow, small = jpeft.narrowed(model, variables, keep)
  moves = {'encoder': {0: 0, 2: 1}, 'decoder': {0: 0, 2: 1}}
  if name.startswith('t5'):
    moves['decoder'] = {1: 0}
  params = dict(variables['params'])
  for stack in moves.keys() & params.keys():
    blocks = {key: x for key, x in params[stack].items() if not key.startswith('block')}
    for old, new in moves[stack].items():
      blocks[f'block_{new}'] = params[stack][f'block_{old}']
    params[stack] = blocks
  options = {'depth': 2, 'decoder_depth': 1} if name.startswith('t5') else {'depth': 2}
  want = outputs(model.clone(**options), {'params': params}, inputs)
  np.testing.assert_array_equal(outputs(narrow, small, inputs), want)
  scanned, stacked, _ = made(name, scan=True)
  narrow, small = jpeft.narrowed(scanned, stacked, keep)
  assert narrow.scan
  shapes = jax.eval_shape(narrow.init, jax.random.key(0), *inputs)
  assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, shapes)
  first = next(stack for stack in ('encoder', 'decoder') if stack in params)
  got = small['params'][first]['blocks']['mlp']['fc1']['kernel']
  want = stacked['params'][first]['blocks']['mlp']['fc1']['kernel']
  np.testing.assert_array_equal(got, want[np.array([0, 2])])


@pytest.mark.parametrize('name', ['bert', 't5', 't5_gated', 'llama', 'qwen'])
def test_a_cut_vocabulary_gives_the_same_logits_of_its_words(name):
  model, variables, inputs = made(name)
  words = np.unique(np.concatenate([np.ravel(tokens) for tokens in inputs]))
  assert 4 < len(words) < 20
  narrow, small = jpeft.narrowed(model, variables, Keep(vocabulary=words))
  renumbered = [jnp.asarray(np.searchsorted(words, tokens)) for tokens in inputs]
  got = outputs(narrow, small, renumbered)
  want = outputs(model, variables, inputs)
  if name != 'bert':
    want = want[..., words]
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  assert narrow.vocab == len(words)


@pytest.mark.parametrize('scan', [False, True])
def test_cuts_of_cuts_are_one_cut(scan):
  model, variables, inputs = made('t5', scan)
  twice = jpeft.narrowed(model, variables, keep_of('t5', UNEQUAL))
  again = Keep(layers=(1, 2), heads={1: (0, 3), 2: (2,)}, mlp={1: (1, 2)})
  twice = jpeft.narrowed(*twice, again)
  once_keep = Keep(
    layers=(1, 2),
    heads={1: (0, 3), 2: (3,)},
    mlp={1: (4, 8), 2: (11,)},
    decoder=keep_of('t5', UNEQUAL).decoder,
  )
  once = jpeft.narrowed(model, variables, once_keep)
  abstract = jax.eval_shape(lambda v: jpeft.narrowed(model, v, once_keep)[1], variables)
  assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, once[1])
  assert once[0] == twice[0] and once[0].bias_heads == ((0, 1), (1,))
  assert once[1]['params']['encoder']['position_bias']['embedding'].shape[1] == 2
  jax.tree.map(np.testing.assert_array_equal, once[1], twice[1])


@pytest.mark.parametrize('name', ['vit', 't5', 'qwen'])
@pytest.mark.parametrize('make', [jpeft.lora, jpeft.lst, jpeft.qst, jpeft.prefix])
def test_methods_learn_on_a_narrow_model(name, make):
  model, variables, inputs = made(name, scan=True)
  model, variables = jpeft.narrowed(model, variables, keep_of(name, UNEQUAL))
  tuned = jpeft.attach(model, make(4), variables, *inputs)
  trained, held = tuned.split(tuned.init(jax.random.key(0), variables))

  @jax.jit
  def loss(trained):
    return jnp.square(tuned.apply(tuned.join(trained, held), variables, *inputs) - 1).mean()

  step = lambda t, g: t - 1e-3 * g / (1e-6 + jnp.abs(g).max())
  moved = jax.tree.map(step, trained, jax.grad(loss)(trained))
  assert loss(moved) < loss(trained)


def test_side_blocks_are_not_cut_out_of_blocks_of_several_sizes():
  model, variables, inputs = made('vit')
  model, variables = jpeft.narrowed(model, variables, Keep(mlp={1: range(8)}))
  with pytest.raises(ValueError, match="blocks 'encoder/block_0' and 'encoder/block_1' have diff"):
    jpeft.attach(model, jpeft.lst(2, prune='magnitude'), variables, *inputs)


def test_a_theta_is_cut_and_put_back():
  model, variables, inputs = made('llama', scan=True)
  keep = Keep(layers=(0, 2), heads=UNEQUAL['heads'], mlp={2: (11,)}, vocabulary=range(3, 20))
  narrow, small = jpeft.narrowed(model, variables, keep)
  method = jpeft.lora(2, targets='{linear}|{embed}')
  wide_tuned = jpeft.attach(model, method, variables, *inputs)
  tuned = jpeft.attach(narrow, method, small, *inputs)
  theta = tuned.init(jax.random.key(0), small)
  rng = np.random.default_rng(5)
  theta = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype('f')), theta)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), wide_tuned.shapes)
  wide = jpeft.widened_theta(model, keep, theta, zeros)
  assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, zeros)
  assert sum(np.count_nonzero(x) for x in jax.tree.leaves(wide)) == jpeft.count(theta)
  back = jpeft.narrowed_theta(model, keep, wide, tuned.shapes)
  jax.tree.map(np.testing.assert_array_equal, back, theta)
  # What LoRA adds to a kept place is what it adds in the narrow model, and nothing elsewhere.
  moved = wide_tuned.merge(wide, variables)
  cut = jpeft.narrowed(model, moved, keep)[1]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6), cut, tuned.merge(theta, small)
  )
  before, after = (
    x['params']['decoder']['blocks']['attention']['query']['kernel'] for x in (variables, moved)
  )
  changed = np.asarray(before != after).reshape(3, 16, 4, -1).any((1, 3))
  np.testing.assert_array_equal(changed, [[0, 0, 0, 1], [0] * 4, [1, 1, 0, 1]])


def test_entries_that_are_not_of_a_linear_map_are_refused():
  model, variables, inputs = made('vit')
  keep = Keep(mlp={0: (1, 2)})
  narrow, small = jpeft.narrowed(model, variables, keep)

  def both(method):
    thetas = []
    for held, backbone in ((model, variables), (narrow, small)):
      tuned = jpeft.attach(held, method, backbone, *inputs)
      thetas.append(tuned.init(jax.random.key(0), backbone))
    return thetas

  squares = jpeft.matrix(
    'squares', lambda key, w: {'s': jnp.ones((w.size,))}, lambda t, w: w * t['s'].reshape(w.shape)
  )
  wide, theta = both(jpeft.at('{fc1}', squares))
  with pytest.raises(ValueError, match=r"squares/.*kernel/s' of shape \(192,\) .* and \(32,\)"):
    jpeft.widened_theta(model, keep, theta, wide)
  rows = jpeft.matrix('rows', lambda key, w: {'rows': jnp.arange(2)}, lambda t, w: w)
  wide, theta = both(jpeft.at('{fc1}', rows))
  with pytest.raises(ValueError, match='numbers parts of a matrix that is cut'):
    jpeft.narrowed_theta(model, keep, wide, theta)
  with pytest.raises(ValueError, match="no entry 'rows' for"):
    jpeft.widened_theta(model, keep, theta, {})
  with pytest.raises(ValueError, match='which the narrow model has not; did you mean'):
    jpeft.widened_theta(model, keep, {'rows': {'encoder/block_0/mlp/fc3': {}}}, wide)


@pytest.mark.parametrize(
  'keep,problem',
  (
    (Keep(heads={1: (0, 4)}), "heads of layer 1 of 'encoder': 4 is not among the 4 heads, 0 to 3"),
    (Keep(heads={1: (-1,)}), '-1 is not among the 4 heads'),
    (Keep(heads={1: (2, 2)}), r'must ascend, each once; got \(2, 2\)'),
    (Keep(mlp={1: (3, 2)}), 'mlp of layer 1 .* must ascend'),
    (Keep(heads={1: ()}), 'numbers of the heads that stay, at least one'),
    (Keep(mlp={0: [True] * 12}), r'np.flatnonzero\(mask\), in place of a mask'),
    (Keep(mlp={0: [0.5]}), 'whole numbers'),
    (Keep(layers=()), "layers of 'encoder': give numbers of the layers that stay"),
    (Keep(layers=(0, 3)), '3 is not among the 3 layers'),
    (Keep(heads={3: (0,)}), 'there is no layer 3 among the 3 layers, 0 to 2'),
    (Keep(layers=(0, 2), mlp={1: (0,)}), r'layer 1 is not among those that stay, \(0, 2\)'),
    (Keep(cross_heads={0: (0,)}), "the blocks of 'encoder' have no cross-attention"),
    (Keep(vocabulary=(0, 1)), 'a ViT reads no words'),
    (Keep(decoder=Keep()), 'this model has one stack'),
  ),
)
def test_what_is_not_there_is_one_sentence(keep, problem):
  model, variables, _ = made('vit')
  with pytest.raises(ValueError, match=problem):
    jpeft.narrowed(model, variables, keep)


def test_what_cannot_be_narrowed_is_one_sentence():
  model, variables, inputs = made('vit')
  boxed = jpeft.quantize(model, jpeft.nf4(), variables, *inputs)
  with pytest.raises(ValueError, match='narrow the model, then quantize it'):
    jpeft.narrowed(model, boxed, Keep(layers=(0,)))
  narrow, small = jpeft.narrowed(model, variables, Keep(layers=(0,)))
  boxed = jpeft.quantize(narrow, jpeft.nf4(), small, *inputs)
  assert outputs(narrow, boxed, inputs).shape == (2, 3)
  with pytest.raises(
    ValueError, match="only the backbone has 'encoder/block_0/attention/key/bias'"
  ):
    jpeft.narrowed(made('vit', scan=True)[0], variables, Keep(layers=(0,)))
  with pytest.raises(ValueError, match=r'shape \(3,\) in the backbone and \(5,\) in the model'):
    jpeft.narrowed(model.clone(num_classes=5), variables, Keep(layers=(0,)))
  with pytest.raises(ValueError, match='the variables also have cache'):
    jpeft.narrowed(model, {**variables, 'cache': {}}, Keep(layers=(0,)))
  with pytest.raises(TypeError, match='ViT, Bert, T5, Llama, .* got Attention'):
    jpeft.narrowed(models.nn.Attention(1, 2), variables, Keep())
  with pytest.raises(ValueError, match='which are those of Keep.vocabulary'):
    jpeft.narrowed(*made('t5')[:2], Keep(decoder=Keep(vocabulary=(0,))))
  padded = BERT(pad_id=1)
  with pytest.raises(ValueError, match='which must keep its number: keep the words 0 to 1'):
    jpeft.narrowed(padded, made('bert')[1], Keep(vocabulary=(1, 2, 3)))


@pytest.mark.parametrize(
  'model,problem',
  (
    (
      VIT(scan=True, heads=(1, 2, 4), head_dim=4),
      'differ in their sizes or windows: use scan=False',
    ),
    (VIT(heads=(1, 2, 4)), r'heads=\(1, 2, 4\) head_dim must say'),
    (VIT(mlp_dim=(1, 2)), r'mlp_dim=\(1, 2\) has 2 values, one a block, and there are 3'),
    (T5(heads=(1, 2, 4)), r'heads=\(1, 2, 4\) share one position bias: bias_heads must say'),
    (T5(bias_heads=((0,), (1,), (2,))), r'bias_heads=\(0,\) names 1 heads .* 4 heads of the block'),
  ),
)
def test_sizes_that_do_not_fit_are_one_sentence(model, problem):
  inputs = (IMAGES,) if isinstance(model, models.ViT) else (TOKENS, TARGETS)
  with pytest.raises(ValueError, match=problem):
    jax.eval_shape(model.init, jax.random.key(0), *inputs)


def cut_evenly(model):
  """A `Keep` of as much of each layer."""
  heads = model.kv_heads if isinstance(model, models.Llama) else model.heads
  half = {n: range(heads // 2) for n in range(model.depth)}
  units = {n: range(1, model.mlp_dim) for n in range(model.depth)}
  decoder = None
  if isinstance(model, models.T5):
    layers = range(model.decoder_depth)
    decoder = Keep(
      heads={n: half[0] for n in layers},
      cross_heads={n: half[0] for n in layers},
      mlp={n: units[0] for n in layers},
    )
  return Keep(heads=half, mlp=units, decoder=decoder)


@pytest.mark.parametrize('name', NAMES)
def test_a_narrow_model_is_saved_and_loaded(name, tmp_path):
  loaded = models.load(GOLDEN / name)
  even = cut_evenly(loaded.model)
  uneven = Keep(heads={0: even.heads[0]}, mlp={1: (2,)}, decoder=even.decoder)
  for keep in (even, uneven):
    narrow, small = jpeft.narrowed(loaded.model, loaded.variables, keep)
    models.save_pretrained(tmp_path, narrow, small, loaded.config)
    again = models.load(tmp_path)
    assert again.model == narrow
    jax.tree.map(np.testing.assert_array_equal, again.variables, small)
    # transformers has one number for all blocks, and for some families none for the size of a head.
    plain = keep is even and name in (*CAUSAL, 't5', 't5_gated')
    assert ('jpeft_sizes' in again.config) == (not plain)
    models.save_pretrained(tmp_path, again.model, again.variables, again.config)
    assert models.load(tmp_path).model == narrow
    if keep is even:
      assert models.load(tmp_path, scan=True).model == narrow.clone(scan=True)
    else:
      with pytest.raises(ValueError, match='differ in their sizes or windows: use scan=False'):
        models.load(tmp_path, scan=True)
    if keep is uneven and isinstance(narrow, models.T5):
      with pytest.raises(ValueError, match='different heads of a shared position bias'):
        models.load(tmp_path, layers=1)
    else:
      assert models.load(tmp_path, layers=1).model.depth == 1


def test_a_cut_vocabulary_is_saved_under_a_config_of_its_own(tmp_path):
  loaded = models.load(GOLDEN / 'llama')
  narrow, small = jpeft.narrowed(loaded.model, loaded.variables, Keep(vocabulary=range(9)))
  with pytest.raises(ValueError, match='the model knows 9 words and its config says'):
    models.save_pretrained(tmp_path, narrow, small, loaded.config)
  models.save_pretrained(tmp_path, narrow, small, loaded.config | {'vocab_size': 9})
  assert models.load(tmp_path).model == narrow


def test_a_narrow_decoder_writes_the_same_with_a_cache():
  model, variables, (tokens,) = made('qwen')
  narrow = jpeft.narrowed(model, variables, keep_of('qwen', UNEQUAL))
  written = [generate(*narrow, tokens, new_tokens=5, cache=cache).tokens for cache in (True, False)]
  np.testing.assert_array_equal(*written)
