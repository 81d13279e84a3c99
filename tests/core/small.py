"""Rules of a few lines, and models of a few units, for the tests of the mechanism."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft import Call, Method, Weight, at, generated, matrix
from tests import fixtures

WIDTH = 6


def low_rank(targets: str, name: str = 'low', dot: bool = True, **options):
  """w + a b, through the layer's own product or, without `dot`, through its weights."""

  def init(key, w):
    return {'a': jax.random.normal(key, (w.shape[0], 2)), 'b': jnp.zeros((2, w.shape[1]))}

  fused = (lambda t, x, y, w, key: y + (x @ t['a']) @ t['b']) if dot else None
  return at(targets, matrix(name, init, lambda t, w: w + t['a'] @ t['b'], fused, **options))


def gain(targets: str, name: str = 'gain', **options):
  """w l, one number per output."""
  return at(
    targets,
    matrix(
      name,
      lambda key, w: {'l': jnp.ones(w.shape[1])},
      lambda t, w: w * t['l'],
      lambda t, x, y, w, key: y * t['l'],
      **options,
    ),
  )


def square(targets: str, name: str = 'square', dot: bool = True):
  """w + c w w^T w: needs the weights as earlier rules left them."""

  def weight(t, w):
    return w + t['c'] * w @ w.T @ w

  def through(t, x, y, w, key):
    return y + t['c'] * (x @ (w() @ w().T @ w()))

  return at(
    targets, matrix(name, lambda key, w: {'c': jnp.zeros(())}, weight, through if dot else None)
  )


def shift(targets: str, name: str = 'shift'):
  """A call that scales and shifts what a Dense layer gives."""

  def init(key, site, arrays):
    return {'s': jnp.ones(site.out.shape[-1]), 'c': jnp.zeros(site.out.shape[-1])}

  def merge(t, site, a):
    return {'kernel': a['kernel'] * t['s'], 'bias': a['bias'] * t['s'] + t['c']}

  return at(targets, Call(name, lambda t, call, x: call(x) * t['s'] + t['c'], init, merge))


def train(targets: str, name: str = 'train', arrays=None):
  """theta stands in for the arrays of a site."""
  init = lambda key, site, p: {n: p[n] for n in arrays or p}
  return at(targets, Weight(name, init, lambda t, site, p: t))


def adapter(targets: str, name: str = 'adapter'):
  """h + tanh(h down) up, on the first array that a site returns."""

  def init(key, site, arrays):
    d = site.out.shape[-1]
    return {'down': jax.random.normal(key, (d, 2)), 'up': jnp.zeros((2, d))}

  def apply(t, call, *args, **kwargs):
    leaves, tree = jax.tree.flatten(call(*args, **kwargs))
    leaves[0] = leaves[0] + jnp.tanh(leaves[0] @ t['down']) @ t['up']
    return jax.tree.unflatten(tree, leaves)

  return at(targets, Call(name, apply, init))


def spy(targets: str, see, name: str = 'spy', **fields):
  """A call that shows its Bound to `see` at every trace, and changes nothing."""

  def apply(t, call, *args, **kwargs):
    see(call)
    return call(*args, **kwargs)

  return at(targets, Call(name, apply, **fields))


class Block(nn.Module):
  """x -> x + tanh(dense(x)), and None for `nn.scan`."""

  @nn.compact
  def __call__(self, x):
    return x + jnp.tanh(nn.Dense(x.shape[-1], name='fc')(x)), None


class Blocks(nn.Module):
  """`depth` blocks: block_0, ... or, of `stack` 'scan' or 'scan remat', one stack called blocks."""

  depth: int = 3
  stack: str = ''

  @nn.compact
  def __call__(self, x):
    if not self.stack:
      for i in range(self.depth):
        x, _ = Block(name=f'block_{i}')(x)
      return x
    block = nn.remat(Block, prevent_cse=False) if 'remat' in self.stack else Block
    scan = nn.scan(
      block, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth
    )
    return scan(name='blocks')(x)[0]


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.fc = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return x + jnp.tanh(self.fc(x))


class NnxBlocks(nnx.Module):
  """The same in NNX: blocks/0, ... or, of `stack` 'scan', one stack called blocks."""

  def __init__(self, depth: int = 3, stack: str = ''):
    self.stack = stack
    rngs = nnx.Rngs(0)
    if stack:
      make = nnx.split_rngs(splits=depth)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
      self.blocks = make(rngs)
    else:
      self.blocks = nnx.List([NnxBlock(rngs) for _ in range(depth)])

  def __call__(self, x):
    if self.stack:
      return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x, self.blocks
      )
    for block in self.blocks:
      x = block(x)
    return x


X = jnp.asarray(np.random.default_rng(0).standard_normal((4, WIDTH)), jnp.float32)


def backbone(model, *args, **kwargs) -> Any:
  """What a model holds, off its initial values, so that biases are not zero."""
  if isinstance(model, nnx.Module):
    return noisy(nnx.state(model))
  rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  return noisy(model.init(rngs, *(args or (X,)), **kwargs))


def plain(model, held, *args, **kwargs):
  """The untouched model's output."""
  if isinstance(model, nnx.Module):
    return nnx.merge(nnx.graphdef(model), held, copy=True)(*args, **kwargs)
  return model.apply(held, *args, **kwargs)


def noisy(tree, size: float = 0.3):
  """A tree with normal noise on every float, always the same."""
  return fixtures.noisy(tree, size)


# Paths of the blocks of all of `stacks`.
BLOCKS = r'blocks?(?:[_/]\d+)?'
FC = f'{BLOCKS}/fc'


def stacks(depth: int) -> dict[str, Any]:
  """{name: a function that makes a model of `depth` blocks}, one for each kind of stack."""
  return {
    'linen': lambda: Blocks(depth),
    'linen scan': lambda: Blocks(depth, 'scan'),
    'linen scan remat': lambda: Blocks(depth, 'scan remat'),
    'nnx': lambda: NnxBlocks(depth),
    'nnx scan': lambda: NnxBlocks(depth, 'scan'),
  }


def shared_factor(method: Method, **options) -> Method:
  """A low-rank method of one matrix a site, whose a all sites and layers share."""

  def init(key, places):
    first = next(iter(places.values())).t['kernel']['a']
    own = {path: {'b': place.t['kernel']['b']} for path, place in places.items()}
    return {'': {'a': first.reshape(-1, *first.shape[-2:])[0]}, **own}

  def expand(t, places):
    made = {}
    for path, place in places.items():
      a = jnp.broadcast_to(t['']['a'], place.t['kernel']['a'].shape)
      made[path] = {'kernel': {'a': a, 'b': t[path]['b']}}
    return made

  return generated(method, init, expand, **options)
