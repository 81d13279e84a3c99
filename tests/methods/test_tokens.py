"""Tokens among those of a model: where they stand, what follows them, what becomes of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft import Call, Tokens, at, chain
from jpeft.models import Llama
from tests.core.small import backbone, noisy, plain

WIDTH, LENGTH, COUNT = 4, 3, 2
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)), jnp.float32)
NEW = jnp.asarray(np.random.default_rng(1).standard_normal((COUNT, WIDTH)), jnp.float32)
CAUSAL = nn.make_causal_mask(X[..., 0], dtype=bool)
BLOCKS = r'blocks?(?:[_/]\d+)?'


def mixed(fc, x, mask):
  """A block: attention of the tokens themselves, and a dense layer."""
  heads = x[:, :, None]
  y = nn.dot_product_attention(heads, heads, heads, mask=mask)[:, :, 0]
  return x + jnp.tanh(fc(x + y))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, mask=None):
    return mixed(nn.Dense(WIDTH, name='fc'), x, mask), None


class Blocks(nn.Module):
  depth: int = 2
  stack: str = ''

  @nn.compact
  def __call__(self, x, mask=None):
    if not self.stack:
      for i in range(self.depth):
        x, _ = Block(name=f'block_{i}')(x, mask)
      return x
    block = nn.remat(Block, prevent_cse=False) if 'remat' in self.stack else Block
    scan = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.depth,
    )
    return scan(name='blocks')(x, mask)[0]


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.fc = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x, mask=None):
    return mixed(self.fc, x, mask)


class NnxBlocks(nnx.Module):
  def __init__(self, stack=''):
    rngs = nnx.Rngs(0)
    self.stack = stack
    if stack:
      make = nnx.split_rngs(splits=2)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
      self.blocks = make(rngs)
    else:
      self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])

  def __call__(self, x, mask=None):
    if self.stack:
      run = nnx.scan(lambda x, block: block(x, mask), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      return run(x, self.blocks)
    for block in self.blocks:
      x = block(x, mask)
    return x


MODELS = {
  'linen': Blocks,
  'linen scan': lambda: Blocks(stack='scan'),
  'linen scan remat': lambda: Blocks(stack='scan remat'),
  'nnx': NnxBlocks,
  'nnx scan': lambda: NnxBlocks('scan'),
}
PLACES = {'lead': 0, 'front': 0, 'end': LENGTH, 1: 1}


def layers(held):
  """[fc, fc] of a backbone of any kind, each as a function."""
  flat = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(held)}
  kernels = [x for path, x in sorted(flat.items()) if 'kernel' in path]
  biases = [x for path, x in sorted(flat.items()) if 'bias' in path]
  if kernels[0].ndim == 3:  # one stack
    kernels, biases = kernels[0], biases[0]
  return [lambda x, w=w, b=b: x @ w + b for w, b in zip(kernels, biases, strict=True)]


def among(x, new, start):
  new = jnp.broadcast_to(new, (len(x), COUNT, WIDTH))
  return jnp.concatenate([x[:, :start], new, x[:, start:]], 1)


def apart(x, start):
  return np.delete(x, range(start, start + COUNT), 1), x[:, start : start + COUNT]


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('name', MODELS)
def test_tokens_enter_every_block_and_are_read_where_they_leave(name, place):
  model = MODELS[name]()
  held = backbone(model, X)

  def block(t, call, *args, **kwargs):
    tokens = Tokens(COUNT, place, causal=True)
    args, kwargs = tokens.enter(call, args, kwargs, t['new'])
    out, left = tokens.leave(call, call(*args, **kwargs))
    call.aux(left=left)
    return out

  init = lambda key, site, arrays: {'new': jnp.zeros((COUNT, WIDTH))}
  tuned = jpeft.attach(model, at(BLOCKS, Call('m', block, init)), held, X, CAUSAL)
  theta = jax.tree.map(lambda x: jnp.broadcast_to(NEW, x.shape), tuned.shapes)
  out, aux = jax.jit(lambda theta: tuned.apply(theta, held, X, CAUSAL, aux=True))(theta)

  start = PLACES[place]
  mask = nn.make_causal_mask(jnp.ones((2, LENGTH + COUNT)), dtype=bool)
  x = X
  for i, fc in enumerate(layers(held)):
    x, left = apart(mixed(fc, among(x, NEW, start), mask), start)
    np.testing.assert_allclose(aux['left'][i], left, atol=1e-5)
  np.testing.assert_allclose(out, x, atol=1e-5)
  assert np.abs(left - NEW).max() > 1e-2
  hidden = place == 'end'  # no earlier token sees them
  assert (np.abs(out - plain(model, held, X, CAUSAL)).max() < 1e-5) == hidden


def test_tokens_travel_change_and_leave_at_the_end():
  """Those of a later layer are a mixture of new ones and of what became of the first."""
  model = Blocks(depth=3)
  held = backbone(model, X)
  tokens = Tokens(COUNT, 1)

  def first(t, call, *args):
    return call(*tokens.enter(call, args, {}, NEW)[0])

  def later(t, call, *args):
    args, kwargs = tokens.carry(call, args, {}, lambda old: 0.3 * NEW + 0.7 * old)
    return call(*args, **kwargs)

  def last(t, call, *args):
    args, kwargs = tokens.carry(call, args, {})
    out, left = tokens.leave(call, call(*args, **kwargs))
    call.aux(left=left)
    return out

  method = chain(*(at(f'block_{i}', Call('m', fn)) for i, fn in enumerate((first, later, last))))
  open_mask = jnp.ones((2, 1, LENGTH, LENGTH), bool)
  tuned = jpeft.attach(model, method, held, X, open_mask)
  out, aux = tuned.apply({}, held, X, open_mask, aux=True)

  one, two, three = layers(held)
  x = mixed(one, among(X, NEW, 1), None)
  rest, old = apart(x, 1)
  x = mixed(two, among(rest, 0.3 * NEW + 0.7 * old, 1), None)
  rest, left = apart(mixed(three, x, None), 1)
  np.testing.assert_allclose(out, rest, atol=1e-5)
  np.testing.assert_allclose(aux['left'][0], left, atol=1e-5)


def test_tokens_gather_at_the_end():
  """Each layer keeps those of the layers before and appends its own."""
  model = Blocks(depth=3)
  held = backbone(model, X)
  seen = []

  def block(t, call, *args):
    before = COUNT * call.number
    args, kwargs = Tokens(before, 'end').carry(call, args, {})
    args, kwargs = Tokens(COUNT, 'end').enter(call, args, kwargs, NEW)
    seen.append((args[0].shape[1], args[1].shape))
    out = call(*args, **kwargs)
    if call.number == 2:
      out, _ = Tokens(before + COUNT, 'end').leave(call, out)
    return out

  mask = jnp.ones((2, 1, 1, LENGTH), bool)
  tuned = jpeft.attach(model, at('block_.', Call('m', block)), held, X, mask)
  seen.clear()
  out = tuned.apply({}, held, X, mask)
  assert seen == [(n, (2, 1, 1, n)) for n in (5, 7, 9)]
  x = X
  for fc in layers(held):
    x = jnp.concatenate([x, jnp.broadcast_to(NEW, (2, COUNT, WIDTH))], 1)
    x = mixed(fc, x, None)
  np.testing.assert_allclose(out, x[:, :LENGTH], atol=1e-5)


def test_examples_may_have_tokens_of_their_own():
  model = Blocks(depth=1)
  held = backbone(model, X)
  own = jnp.stack([NEW, 2 * NEW])

  def block(t, call, *args):
    args, kwargs = Tokens(COUNT).enter(call, args, {}, own)
    return Tokens(COUNT).leave(call, call(*args, **kwargs))[0]

  tuned = jpeft.attach(model, at('block_0', Call('m', block)), held, X)
  out = tuned.apply({}, held, X)
  (fc,) = layers(held)
  want, _ = apart(mixed(fc, among(X, own, 0), None), 0)
  np.testing.assert_allclose(out, want, atol=1e-5)


class Seen(nn.Module):
  """Hands over what it is called with."""

  see: object

  @nn.compact
  def __call__(self, x, **given):
    self.see(given)
    return x + nn.Dense(WIDTH, name='fc')(x)


def followed(tokens, x=X, new=NEW, **given):
  """The further arguments of a module, with tokens in its sequence."""
  seen = []
  model = nn.Sequential([Seen(seen.append)])
  held = model.init(jax.random.key(0), x, **given)

  def rule(t, call, *args, **kwargs):
    args, kwargs = tokens.enter(call, args, kwargs, new)
    return tokens.leave(call, call(*args, **kwargs))[0]

  tuned = jpeft.attach(model, at('layers_0', Call('m', rule)), held, x, **given)
  jax.eval_shape(lambda: tuned.apply({}, held, x, **given))
  seen.clear()
  tuned.apply({}, held, x, **given)
  return seen[-1]


@pytest.mark.parametrize('place', PLACES)
def test_a_causal_mask_grows_to_a_causal_mask(place):
  wanted = np.tril(np.ones((5, 5), bool))
  padded = CAUSAL & jnp.array([[1, 1, 1], [0, 1, 1]], bool)[:, None, None]
  given = followed(
    Tokens(COUNT, place, causal=True),
    mask=CAUSAL,
    padded=padded,
    numbers=CAUSAL.astype(jnp.int32),
    bias=jnp.where(CAUSAL, 0.0, -1e9),
    keys=jnp.ones((2, LENGTH)),
    positions=jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)),
  )
  np.testing.assert_array_equal(given['mask'], np.broadcast_to(wanted, (2, 1, 5, 5)))
  np.testing.assert_array_equal(given['numbers'], np.broadcast_to(wanted, (2, 1, 5, 5)))
  np.testing.assert_array_equal(given['bias'] > -1, np.broadcast_to(wanted, (2, 1, 5, 5)))
  assert np.isfinite(given['bias']).all()
  assert given['keys'].shape == (2, 5)
  np.testing.assert_array_equal(given['positions'], [range(5)] * 2)
  start = PLACES[place]
  hidden = 0 if start > 0 else COUNT  # where the padding of the second row has come to stand
  others = np.delete(range(5), hidden)
  np.testing.assert_array_equal(
    given['padded'][1, 0][np.ix_(others, others)], wanted[np.ix_(others, others)]
  )
  own = slice(start, start + COUNT)
  assert not np.delete(given['padded'][1, 0, :, hidden], range(start, start + COUNT)).any()
  np.testing.assert_array_equal(given['padded'][1, 0, own, own], np.tril(np.ones((2, 2), bool)))


def test_without_causal_everyone_sees_the_tokens_and_these_what_the_first_token_sees():
  mask = followed(Tokens(COUNT, 1), mask=CAUSAL)['mask'][0, 0]
  wanted = [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
  np.testing.assert_array_equal(mask, np.array(wanted, bool))


MASKS = {
  'bool': CAUSAL,
  'of flax': nn.make_causal_mask(X[..., 0]),
  'added': jnp.where(CAUSAL, 0.0, -1e9),
  'made a bias': CAUSAL.astype(jnp.float32),
}


class Masked(nn.Module):
  """Attention under a mask of any kind, in a block of its own."""

  kind: str

  @nn.compact
  def __call__(self, x, mask):
    if self.kind == 'added':
      given = {'bias': mask}
    elif self.kind == 'made a bias':
      given = {'bias': (1 - mask) * -1e9}
    else:
      given = {'mask': mask}
    heads = x[:, :, None]
    y = nn.dot_product_attention(heads, heads, heads, **given)[:, :, 0]
    return x + nn.Dense(WIDTH, name='fc')(y)


@pytest.mark.parametrize('way', ['enter', 'carry'])
@pytest.mark.parametrize('kind', MASKS)
def test_a_mask_of_floats_is_what_the_module_makes_of_it(kind, way):
  model = nn.Sequential([Masked(kind)])
  held = backbone(model, X, MASKS[kind])
  tokens = Tokens(COUNT, 1)

  def rule(t, call, x, mask):
    if way == 'enter':
      args, kwargs = tokens.enter(call, (x, mask), {}, NEW)
    else:
      args, kwargs = tokens.carry(call, (among(x, NEW, 1), mask), {})
    return tokens.leave(call, call(*args, **kwargs))[0]

  tuned = jpeft.attach(model, at('layers_0', Call('m', rule)), held, X, MASKS[kind])
  out = jax.jit(lambda held: tuned.apply({}, held, X, MASKS[kind]))(held)
  seen = np.array([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
  fc = held['params']['layers_0']['fc']
  x = among(X, NEW, 1)
  heads = x[:, :, None]
  y = nn.dot_product_attention(heads, heads, heads, mask=seen[None, None])[:, :, 0]
  want, _ = apart(x + y @ fc['kernel'] + fc['bias'], 1)
  np.testing.assert_allclose(out, want, atol=1e-5)


PAIR = (jnp.ones((2, 8, 1, WIDTH)), jnp.ones((2, 8, 1, WIDTH)))
MISTAKES = {
  'a place': (lambda: Tokens(2, 'middle'), r"place='middle' must be 'lead', 'front'"),
  'a count': (lambda: Tokens(-1), r'count=-1 must be a whole number'),
  'too far': (lambda: followed(Tokens(2, 4)), r"behind 4 others in 'layers_0': its sequence has 3"),
  'another width': (
    lambda: followed(Tokens(2), new=jnp.ones((2, 5))),
    r"that enter 'layers_0' are \[2, 4\] or \[2, 2, 4\], not \[2, 5\]",
  ),
  'no sequence': (
    lambda: followed(Tokens(2), x=jnp.ones((2, WIDTH))),
    r"enter a sequence \[B, N, D\], and 'layers_0' has \[2, 4\]",
  ),
  'arrays of the length': (
    lambda: followed(Tokens(2), rotary=(jnp.ones((1, LENGTH, 2)), jnp.ones((1, LENGTH, 2)))),
    r"rotary \[1, 3, 2\] of 'layers_0' goes with its 3 tokens",
  ),
  'a cache with room': (
    lambda: followed(Tokens(2), cache={'key': PAIR[0], 'index': jnp.zeros((), jnp.int32)}),
    r"cache of 'layers_0' is a cache of earlier tokens, and the 2 tokens .* call without a cache",
  ),
  'a cache of arrays': (
    lambda: followed(Tokens(2), past_key=PAIR[0]),
    r"past_key of 'layers_0' is a cache of earlier tokens",
  ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_told_in_a_sentence(mistake):
  run, message = MISTAKES[mistake]
  with pytest.raises(ValueError, match=message):
    run()


def test_no_cache_and_positions_in_one_are_no_mistake():
  given = followed(Tokens(2), cache=None, use_cache=False, cache_position=jnp.arange(LENGTH))
  np.testing.assert_array_equal(given['cache_position'], range(5))


@pytest.mark.parametrize('method', [jpeft.vpt_deep(2), jpeft.vpt_shallow(2)])
@pytest.mark.parametrize('room', [6, 12])
def test_a_decoder_with_the_cache_of_the_untuned_model_is_refused(method, room):
  model = Llama(width=8, depth=2, heads=2, mlp_dim=16, vocab=20)
  tokens = jnp.arange(6)[None]
  held = noisy(jax.jit(model.init)(jax.random.key(0), tokens))
  tuned = jpeft.attach(model, method, held, tokens)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  # The first call makes its own cache, with room for the prompts.
  _, grown = tuned.apply(theta, held, tokens, mutable=['cache'])
  assert grown['cache']['decoder']['block_0']['attention']['key'].shape[1] == 8
  _, state = model.apply(held, jnp.zeros((1, room), jnp.int32), mutable=['cache'])
  empty = jax.tree.map(jnp.zeros_like, state['cache'])
  for cache in (empty, grown['cache']):
    with pytest.raises(ValueError, match=r"'decoder.*' is given a cache of earlier tokens, and"):
      tuned.apply(theta, {**held, 'cache': cache}, tokens, mutable=['cache'])


class Decoder(nnx.Module):
  """One block around attention with a cache of its own."""

  def __init__(self):
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return x + self.attention(x)


def test_an_nnx_decoder_that_reads_its_cache_is_refused():
  x = jnp.ones((1, 6, 8))
  model = nnx.Sequential(Decoder())
  layer = model.layers[0]
  method = jpeft.vpt_deep(2, blocks='layers/0')
  layer.attention.init_cache((1, 6, 8))
  held = nnx.state(model)
  tuned = jpeft.attach(model, method, held, x)
  theta = tuned.init(jax.random.key(0), held)
  assert tuned.apply(theta, held, x).shape == x.shape  # it does not decode
  layer.attention.decode = True
  tuned = jpeft.attach(model, method, held, x[:, :1])
  with pytest.raises(ValueError, match="'layers/0' is given a cache of earlier tokens"):
    tuned.apply(theta, held, x[:, :1])
