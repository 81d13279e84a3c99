"""What a block is called with beside its stream goes along wherever a method runs it again."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core.beside import beside
from tests.core.small import noisy

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
MASK = jnp.tril(jnp.ones((5, 5), bool))[None, None]


def rotations(x):
  """(cos, sin), each [N, d], as models hand them to all their blocks."""
  angle = jnp.arange(x.shape[1])[:, None] / 10 ** jnp.arange(x.shape[2])
  return jnp.cos(angle), jnp.sin(angle)


def turned(x, position_embeddings, shift):
  cos, sin = position_embeddings
  return x * cos + jnp.roll(x, shift, -1) * sin


# How blocks are called: with all of their arguments by position, or so that they make some of the
# same values themselves.
CALLS = {
  'all': lambda x: (rotations(x), MASK, None, 3),
  'mask': lambda x: (None, MASK, None, 3),
  'nothing': lambda x: (),
}


def completed(x, position_embeddings, mask, cache):
  assert (cache is None) == (mask is not None)  # `None` is given where the mask is
  if position_embeddings is None:
    position_embeddings = rotations(x)
  return position_embeddings, MASK if mask is None else mask


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, position_embeddings=None, mask=None, cache='none', shift=3):
    position_embeddings, mask = completed(x, position_embeddings, mask, cache)
    h = turned(nn.LayerNorm(name='norm1')(x), position_embeddings, shift)
    x = x + nn.MultiHeadDotProductAttention(2, name='attention')(h, mask=mask)
    h = nn.LayerNorm(name='norm2')(x)
    return x + nn.Dense(8, name='mlp')(h)


class Scanned(Block):
  @nn.compact
  def __call__(self, x, *args):
    return super().__call__(x, *args), None


class Model(nn.Module):
  """`given`: a key of CALLS."""

  given: str
  scan: bool = False

  @nn.compact
  def __call__(self, x):
    args = CALLS[self.given](x)
    if self.scan:
      axes = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}
      stack = nn.scan(Scanned, **axes, in_axes=(nn.broadcast,) * len(args), length=2)
      x, _ = stack(name='blocks')(x, *args)
    else:
      for i in range(2):
        x = Block(name=f'block_{i}')(x, *args)
    return nn.Dense(3, name='head')(nn.LayerNorm(name='final_norm')(x)[:, 0])


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.norm1 = nnx.LayerNorm(8, rngs=rngs)
    self.norm2 = nnx.LayerNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.mlp = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x, position_embeddings=None, mask=None, cache='none', shift=3):
    position_embeddings, mask = completed(x, position_embeddings, mask, cache)
    x = x + self.attention(turned(self.norm1(x), position_embeddings, shift), mask=mask)
    return x + self.mlp(self.norm2(x))


class NnxModel(nnx.Module):
  def __init__(self, given, scan=False):
    rngs = nnx.Rngs(0)
    self.given = given
    self.scan = scan
    if scan:
      split = nnx.split_rngs(splits=2)
      self.blocks = split(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))(rngs)
    else:
      self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
    self.final_norm = nnx.LayerNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    args = CALLS[self.given](x)
    if self.scan:
      layers = nnx.scan(
        lambda x, block: block(x, *args), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
      )
      x = layers(x, self.blocks)
    else:
      for block in self.blocks:
        x = block(x, *args)
    return self.head(self.final_norm(x)[:, 0])


MODELS = {
  'linen': Model,
  'linen scan': functools.partial(Model, scan=True),
  'nnx': NnxModel,
  'nnx scan': functools.partial(NnxModel, scan=True),
}
BLOCKS = r'blocks?(?:[_/]\d+)?'
PLACES = {'blocks': BLOCKS, 'exit': 'final_norm'}
METHODS = {
  'meft': jpeft.meft(2, mlp='.*/mlp', **PLACES),
  'meft in halves': jpeft.meft(2, 3, mlp='.*/mlp', attention='.*/attention', **PLACES),
  'sherl': jpeft.sherl(4, **PLACES),
  'vqt': jpeft.vqt(2, blocks=BLOCKS, attention='.*/attention', head='head'),
  's2a': jpeft.s2a(2, 2, biases=None, blocks=BLOCKS),
  'packed': jpeft.chain(jpeft.lora(2, targets='.*/mlp'), jpeft.packed(BLOCKS)),
}


def run(make, given, method):
  """(output, gradient) under a method, at a theta off its start."""
  model = make(given)
  if isinstance(model, nnx.Module):
    held = noisy(nnx.state(model))
  else:
    held = noisy(model.init(jax.random.key(0), X))
  tuned = jpeft.attach(model, method, held, X)
  trained, rest = tuned.split(noisy(tuned.init(jax.random.key(1), held)))

  def loss(trained):
    out = tuned.apply(tuned.join(trained, rest), held, X)
    return jnp.square(out).sum(), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
  return out, grads


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', MODELS)
def test_arguments_by_position_go_along(name, method):
  # A summary of VQT is no token, and has no position.
  most = 'mask' if method == 'vqt' else 'all'
  given, own = (run(MODELS[name], given, METHODS[method]) for given in (most, 'nothing'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), given, own)


def test_what_goes_by_a_position_is_named():
  with pytest.raises(ValueError, match="'position_embeddings' of the block 'block_0'"):
    run(Model, 'all', METHODS['vqt'])


@pytest.mark.parametrize('name', MODELS)
def test_a_side_network_of_its_own_takes_what_it_knows(name):
  out, _ = run(MODELS[name], 'all', jpeft.lst(2, heads=2, **PLACES))
  assert np.isfinite(out).all()


class Called:
  def call(self, first, x, /, table=None, *rest, deterministic=False, **others):
    """Any kind of parameter; `first` is no array."""


def test_the_call_is_the_same_on_another_stream():
  given = beside(
    Called.call, ('a', X, (X, None), MASK), {'deterministic': True, 'context': X + 1}, ('context',)
  )
  assert len(jax.tree.leaves(given)) == 2  # of the table and the mask
  moved = jax.tree.map(lambda x: x, given)
  assert jax.tree.structure(moved) == jax.tree.structure(given)
  args, kwargs = moved.with_stream(X[:1], context='states')
  assert args[0] == 'a' and args[1].shape == (1, 5, 8) and args[2] == (X, None) or args[2][0] is X
  assert args[2][1] is None and args[3] is MASK
  assert kwargs == {'deterministic': True, 'context': 'states'}


def test_what_cannot_go_along_is_named():
  with pytest.raises(ValueError, match="'table' holds a set, which cannot go along to where"):
    beside(Called.call, ('a', X, {1}), {})
