"""MEFT: a pretrained network made reversible, so that the backward pass stores nothing of a layer.

Liao et al., 2023, "Make Pre-trained Model Reversible: From Parameter to Memory Efficient
Fine-Tuning" (arXiv 2306.00477; BaohaoLiao/mefts). Two streams, both the embeddings at first, go
through layers

  y1 = a x1 + F(x2),  y2 = b x2 + G(y1),

and what is read is their mean. A is a bottleneck adapter, A(x) = f(x W_down + b) W_up + b':

  variant   F                               G                               then         a, b
  1         the block, A beside its MLP     A                               they swap    0.1, 1
  2         A                               the block, A beside its MLP     they swap    1, 0.1
  3         attention half, o <- o + A(o)   MLP half, A beside the MLP      -            0.1, 0.1

As a and b vanish and adapters start near zero, one of the streams follows the backbone:
`readout='last'` reads it, the mean is between the states before and behind the last block. Neither
starts as the backbone exactly.

What is stored: the last streams (float32), and those behind every `every`-th layer. An error of the
streams grows by about 1 / a a layer, in bfloat16 more quickly; `reconstruction_error` measures it.
With a = b = 1 it hardly grows, but the network starts far from the pretrained one. In the model the
blocks become identities, and the exit runs them.

Deviations. Dropout of the adapters is on their bottleneck, and no norm stands before them. Blocks
behind the first `reversible` ones run in one stream, the mean, with their adapters, and are stored
as usual. Variant 3 needs blocks that begin with norms. Blocks that return more than their stream
(attention weights) and caches are not supported.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Call, Method, Site, Tuned, at, chain, factory

from ..adapter.bottleneck import Adapter
from ..arguments import first_array
from ..check import choice, is_whole, require
from ..nn import put_stream
from ..side.stack import Stack
from .reversible import Layers, Reversible


class _Variant(NamedTuple):
  """A row of the table above.

  Attributes:
    f: what F runs: 'block', 'adapter' (the one at the exit), or the half of a block that has the
      role 'attention' or 'mlp'.
    g: what G runs.
    swap: whether the streams change places behind each layer.
    scales: a and b.
    last: which of the two streams a block's output goes to, and so follows the backbone.
  """

  f: str
  g: str
  swap: bool
  scales: tuple[float, float]
  last: int

  @property
  def halves(self) -> bool:
    """Whether F and G are the two halves of a block."""
    return self.f == 'attention'


_VARIANTS = {
  1: _Variant('block', 'adapter', swap=True, scales=(0.1, 1.0), last=1),
  2: _Variant('adapter', 'block', swap=True, scales=(1.0, 0.1), last=0),
  3: _Variant('attention', 'mlp', swap=False, scales=(0.1, 0.1), last=1),
}
READOUTS = ('mean', 'last')

# {path of an exit: errors}, while `reconstruction_error` runs.
_errors: contextvars.ContextVar[dict | None] = contextvars.ContextVar(
  'jpeft_meft_errors', default=None
)


@factory
def meft(
  bottleneck: int = 8,
  variant: int = 1,
  scales: tuple[float, float] | None = None,
  every: int | None = 2,
  reversible: int | None = None,
  readout: str = 'mean',
  activation: str = 'gelu',
  init: str = 'bert',
  dropout: float = 0.0,
  blocks: str = '{block}',
  attention: str | None = None,
  mlp: str = '{mlp}',
  exit: str = '{exit}',
  name: str = 'meft',
) -> Method:
  """MEFT (arXiv 2306.00477).

  Args:
    bottleneck: r of the adapters, two a layer.
    variant: 1, 2 or 3.
    scales: (a, b); the variant's own if left out.
    every: after how many layers streams are stored; None for those behind the last alone.
    reversible: how many layers, the first ones, are; None for all.
    readout: 'mean' of the streams, or 'last', the stream that the blocks' outputs go to.
    activation: of the adapters.
    init: of the adapters, 'lora', 'bert' (as published) or 'houlsby'.
    dropout: rate on their bottleneck.
    blocks: pattern of the blocks.
    attention: pattern of the attention modules in them, of variant 3; {attention} if left out.
    mlp: pattern of the modules in them that an adapter runs beside.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    name: in theta: adapters beside MLPs (and in variant 3 behind attention) at these, the others at
      the exit, [layers, ...] each.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, blocks that change the shape of
      their stream, or, for variant 3, that end with norms.
  """
  choice('meft', 'variant', variant, _VARIANTS)
  chosen = _VARIANTS[variant]
  if scales is None:
    scales = chosen.scales
  return _MEFT(
    adapter=Adapter('meft', activation, init, dropout, bottleneck=bottleneck),
    variant=chosen,
    scales=tuple(scales),
    every=every,
    reversible=reversible,
    readout=readout,
    blocks=blocks,
    attention=attention or '{attention}',
    mlp=mlp,
    exit=exit,
    name=name,
  ).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _MEFT:
  """The hyperparameters of `meft`, and its rules as methods.

  While the exit runs a part of a layer, its `call.local['running']` names that part: 'block',
  'attention' or 'mlp'. The rules inside of the blocks read it as `call.outer`.
  """

  adapter: Adapter
  variant: _Variant
  scales: tuple[float, ...]
  every: int | None
  reversible: int | None
  readout: str
  blocks: str
  attention: str
  mlp: str
  exit: str
  name: str

  def __post_init__(self):
    choice('meft', 'readout', self.readout, READOUTS)
    two_numbers = len(self.scales) == 2 and all(self.scales)
    rule = 'must be two numbers other than 0, which the inverse divides by'
    require(two_numbers, 'meft', 'scales', self.scales, rule)
    if self.every is not None:
      rule = 'must be a whole number, at least 1, or None'
      require(is_whole(self.every, 1), 'meft', 'every', self.every, rule)

  def method(self) -> Method:
    """The blocks become identities; the exit runs them, with adapters, as a reversible network."""
    rules = [at(self.mlp, Call(self.name, self.apply_mlp, self.init_mlp))]
    if self.variant.halves:
      rules.append(at(self.attention, Call(self.name, self.apply_attention, self.init_attention)))
    rules.append(at(self.blocks, Call(self.name, self.skip_block, taps=True)))
    rules.append(at(self.exit, Call(self.name, self.apply, self.init, taps=True)))
    return chain(*rules)

  def stack(self, site: Site) -> tuple[Stack, int]:
    """(the blocks before an exit, how many of their layers are reversible).

    Raises:
      ValueError: the blocks or their number do not fit.
    """
    net = Stack(site, self.blocks, self.exit)
    first = net.stack[0]
    for block in net.stack:
      if block.input.shape != first.input.shape:
        raise ValueError(
          f'{self.name}: all layers read the same two streams, and the block {block.path!r} is '
          f'called with {block.input.shape}, {first.path!r} with {first.input.shape}'
        )
      if block.input.shape != block.out.shape:
        raise ValueError(
          f'{self.name}: streams keep their shape, and the block {block.path!r} maps '
          f'{block.input.shape} to {block.out.shape}'
        )
    count = self.reversible
    if count is None:
      count = net.depth
    if not 0 < count <= net.depth:
      raise ValueError(
        f'{self.name}: reversible={count} must lie between 1 and the {net.depth} blocks before '
        f'{site.path!r}'
      )
    if self.variant.halves and net.wraps_blocks:
      raise ValueError(
        f'{self.name}: variant 3 takes blocks apart that begin with norms, and those in '
        f'{site.path!r} end with one'
      )
    return net, count

  # Inside of the blocks

  def init_mlp(self, key, site: Site, arrays) -> dict:
    return self.adapter.init(key, site.input, site.out)

  def apply_mlp(self, t, call, *args, **kwargs):
    """The MLP with its adapter beside it; zeros while the attention half runs alone."""
    if not _runs(call, 'mlp'):
      return _zeros(call, args, kwargs)
    x = first_array(call, args, kwargs)
    out = call(*args, **kwargs)
    return call.site.map_stream(out, lambda h: h + self.adapter.branch(t, call, x))

  def init_attention(self, key, site: Site, arrays) -> dict:
    return self.adapter.init(key, site.out, site.out)

  def apply_attention(self, t, call, *args, **kwargs):
    """The attention with its adapter behind it; zeros while the MLP half runs alone."""
    if not _runs(call, 'attention'):
      return _zeros(call, args, kwargs)
    out = call(*args, **kwargs)
    return call.site.map_stream(out, lambda o: o + self.adapter.branch(t, call, o))

  def skip_block(self, t, call, *args, **kwargs):
    """Returns the stream as it came, and records what else the block is called with, for the exit.

    Raises:
      ValueError: the block returns more than its stream.
    """
    x = next(iter(call.inputs(*args, **kwargs).values()))
    leaves, tree = jax.tree.flatten(_shapes(call, args, kwargs))
    if len(leaves) != 1:
      raise ValueError(
        f'{self.name}: the block {call.site.path!r} returns {len(leaves)} arrays; only its stream '
        'can be made again'
      )
    call.tap(beside=call.beside(args, kwargs))
    return jax.tree.unflatten(tree, [x])

  # At the exit

  def init(self, key, site: Site, arrays) -> dict:
    """The adapters that are F or G of a whole layer, [layers, ...]; variant 3 has none."""
    net, count = self.stack(site)
    if self.variant.halves:
      return {}
    block = net.stack[0]
    keys = jax.random.split(key, count)  # a start of its own for each layer
    return jax.vmap(lambda key: self.adapter.init(key, block.input, block.out))(keys)

  def apply(self, t, call, x, *args, **kwargs):
    """Runs the blocks: before an exit that follows them, behind one that they are inside of."""
    net, count = self.stack(call.site)
    if not net.wraps_blocks:
      return call(self.through_blocks(t, call, x, net, count), *args, **kwargs)
    # All blocks in the exit are identities: what it returns are the embeddings.
    y = call(x, *args, **kwargs)
    embeddings = call.site.stream(y)
    return put_stream(call.site, y, self.through_blocks(t, call, embeddings, net, count))

  def through_blocks(self, t, call, x: jax.Array, net: Stack, count: int) -> jax.Array:
    """The last hidden state [B, N, d] of embeddings x; the first `count` layers are reversible."""
    layers, rest = self.layers(t, call, x.dtype, net, count)
    # The inverse divides rounding errors by the scales, so that streams have at least float32.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    streams = Reversible(layers, wide, self.scales, self.variant.swap, self.every)
    errors = _errors.get()
    if errors is not None:
      errors[call.site.path] = streams.errors((wide, wide))
    pair = streams((wide, wide))  # two of [B, N, d]
    if self.readout == 'mean':
      y = sum(pair) / 2
    else:
      y = pair[self.variant.last]
    y = y.astype(x.dtype)
    for layer in rest:
      y = layer(y)
    return y

  def layers(
    self, t, call, dtype, net: Stack, count: int
  ) -> tuple[list[Layers], list[Callable[[jax.Array], jax.Array]]]:
    """(the first `count` layers, the further ones as functions of one stream)."""
    own = self.adapter_rows(t, call, count)
    taps = call.taps()
    layers = []
    rest = []
    start = 0  # the number of the block's first layer
    for block in net.stack:
      index = 0
      if block.axes:
        index = None  # all layers of the stack: arrays [layers, ...]
      fn, arrays = call.layer(block, index)
      row = {'arrays': arrays, 'inputs': _layers_first(taps[block.path]['beside'], block)}
      taken = min(block.layers, max(count - start, 0))
      if taken:
        f = self.part(self.variant.f, call, fn, dtype)
        g = self.part(self.variant.g, call, fn, dtype)
        layers.append(_reversible_layers(f, g, row, own, block, start, taken))
      if taken < block.layers:
        run = self.part('block', call, fn, dtype)
        further = _some_layers(row, block, taken, block.layers)
        rest.append(functools.partial(_run_layers, run, further, bool(block.axes)))
      start += block.layers
    return layers, rest

  def adapter_rows(self, t, call, count: int) -> dict:
    """theta of the exit, and in training random keys for its dropout: arrays [count, ...]."""
    if not t:
      return {}
    rows = {'t': t}
    if self.adapter.dropout:
      key = call.rng('meft dropout')
      if key is not None:
        rows['key'] = jax.random.split(key, count)
    return rows

  def part(self, name: str, call, fn: Callable, dtype) -> Callable[[Any, jax.Array], jax.Array]:
    """(row, x) -> what a part of a layer gives: see `_Variant.f`.

    Args:
      name: of the part.
      call: at the exit.
      fn: the block as a pure function of its arrays, its stream and its further inputs.
      dtype: in which it runs.
    """

    def run(row, x):
      x = x.astype(dtype)
      if name == 'adapter':
        return self.adapter.apply(row['t'], x, row.get('key'))
      # Read while the block is traced, so that each part of a layer is a program of its own.
      call.local['running'] = name
      args, kwargs = row['inputs'].with_stream(x)
      out = fn(row['arrays'], *args, **kwargs)
      return call.site.stream(out)

    return run


def reconstruction_error(tuned: Tuned, theta, backbone, *args, **kwargs) -> dict[str, jax.Array]:
  """How far the streams that the backward pass makes again are from those of the forward pass.

  Args:
    tuned: with `meft`.
    theta, backbone, *args, **kwargs: as for `tuned.apply`.

  Returns:
    {path of the exit: [reversible layers]}: the largest difference of the streams before a layer,
    in units of their largest entry. Gradients are off by as much: above some percent store streams
    more often (`every`), or take scales nearer to 1.

  Raises:
    ValueError: the method is not among those of `tuned`.
  """
  found = {}
  token = _errors.set(found)
  try:
    tuned.apply(theta, backbone, *args, **kwargs)
  finally:
    _errors.reset(token)
  if not found:
    raise ValueError(f'none of the methods {", ".join(tuned.method.names)} makes layers reversible')
  return found


def _runs(call: Bound, half: str) -> bool:
  """Whether a module of a half of a block runs: always, but while the other half runs alone."""
  if call.outer is None:
    return True
  return call.outer.get('running', half) in (half, 'block')


def _zeros(call: Bound, args, kwargs):
  """Zeros in the place of a module's output: in a block that begins with norms, x + 0 is left."""
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _shapes(call, args, kwargs))


def _shapes(call: Bound, args, kwargs):
  """What the wrapped call would return, as shapes."""
  fn, arrays = call.pure()
  return jax.eval_shape(lambda arrays: fn(arrays, *args, **kwargs), arrays)


# Rows: trees of arrays [layers, ...] of a stacked block, [...] of a single one.


def _layers_first(taps: Any, block: Site) -> Any:
  """What a block recorded, with the axes of nested scans folded into one."""
  if not block.axes:
    return taps
  axes = len(block.lengths)
  return jax.tree.map(lambda x: x.reshape(block.layers, *x.shape[axes:]), taps)


def _some_layers(row, block: Site, start: int, stop: int):
  """Layers `start` to `stop` of a stacked block; of a single block the one."""
  if not block.axes or stop - start == block.layers:
    return row
  return jax.tree.map(lambda x: x[start:stop], row)


def _reversible_layers(f, g, row, own, block: Site, start: int, count: int) -> Layers:
  """The first `count` layers of a block, the first of them being layer `start` of the network."""
  if not block.axes:
    mine = jax.tree.map(lambda x: x[start], own)
    return Layers(f, g, {**row, **mine})
  mine = jax.tree.map(lambda x: x[start : start + count], own)
  return Layers(f, g, {**_some_layers(row, block, 0, count), **mine}, count)


def _run_layers(run, row, stacked: bool, x: jax.Array) -> jax.Array:
  """x after one layer, or after all of a stack."""

  def step(x, row):
    return run(row, x).astype(x.dtype), None

  if stacked:
    x, _ = jax.lax.scan(step, x, row)
  else:
    x, _ = step(x, row)
  return x
