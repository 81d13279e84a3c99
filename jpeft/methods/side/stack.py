"""What the side methods share: which blocks feed a side network, what is recorded of them, and how
it is read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, natural


@dataclasses.dataclass(frozen=True)
class Stack:
  """The blocks before one exit, and how to read what was recorded of them.

  State 0 is the embeddings x_0, state i the residual stream after i blocks; taps hold the input of
  each block, so that all but the last state are one record, and the last is the exit's own.

  Attributes:
    site: the exit, whose output is the stack's last hidden state.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the exits.
  """

  site: Site
  blocks: str
  exit: str

  @functools.cached_property
  def exits(self) -> list[Site]:
    return [e for e in self.site.model.find(self.exit) if e.out is not None]

  @property
  def is_last(self) -> bool:
    """Whether this exit makes the prediction; an encoder's feeds the decoder's."""
    return self.exits[-1] is self.site

  @functools.cached_property
  def stack(self) -> list[Site]:
    """The blocks before the exit, in order."""
    blocks = sorted(
      (b for b in self.site.model.find(self.blocks) if b.out is not None),
      key=lambda b: natural(b.path),
    )
    within = [b for b in blocks if b.path.startswith(f'{self.site.path}/')]
    if within:
      return within
    parent = self.site.path.rpartition('/')[0]
    found = [b for b in blocks if f'{b.path}/'.startswith(f'{parent}/'.lstrip('/'))]
    if not found:
      raise ValueError(
        f'no block that {self.blocks!r} names lies before the exit {self.site.path!r}'
      )
    return found

  @property
  def wraps_blocks(self) -> bool:
    """Whether the exit runs the blocks itself (their last output is its output)."""
    return self.stack[0].path.startswith(f'{self.site.path}/')

  @property
  def scanned(self) -> bool:
    return len(self.stack) == 1 and bool(self.stack[0].axes)

  @property
  def depth(self) -> int:
    return sum(block.layers for block in self.stack)

  @property
  def width(self) -> int:
    return self.stack[0].input.shape[-1]

  def check_tokens(self, name: str) -> None:
    """Raises a ValueError where some block is not called with the one stream of tokens."""
    for block in self.stack:
      if len(block.input.shape) != 3 or block.input.shape[-1] != self.width:
        raise ValueError(
          f'{name}: a side network reads one stream of tokens [B, N, d], and the block '
          f'{block.path!r} is called with {block.input.shape}'
        )

  def chosen(self, layers: Sequence[int] | None, depth: int | None = None) -> tuple[int, ...]:
    """The layers that are asked for, ascending; None for all of the first `depth`.

    Raises:
      ValueError: there are no such layers.
    """
    depth = self.depth if depth is None else depth
    layers = tuple(range(depth)) if layers is None else tuple(sorted(layers))
    if not layers or min(layers) < 0 or max(layers) >= depth:
      raise ValueError(
        f'layers={list(layers)} must name some of the {depth} blocks 0 to {depth - 1} '
        f'before {self.site.path!r}'
      )
    return layers

  def layer(self, i: int) -> tuple[Site, int]:
    """The site of layer i, and its index in that site's stack."""
    for block in self.stack:
      if i < block.layers:
        return block, i
      i -= block.layers
    raise IndexError(i)

  def _stacked(self, taps, name: str) -> jax.Array:
    """What a scanned stack recorded: [layers, ...]."""
    (block,) = self.stack
    x = taps[block.path][name]
    return x.reshape(block.layers, *x.shape[len(block.lengths) :])

  def _unrolled(self, taps, name: str) -> list[jax.Array]:
    """What unrolled blocks (some of them stacks, perhaps) recorded, one array a layer."""
    rows = [(b, taps[b.path][name]) for b in self.stack]
    return [
      x
      for b, t in rows
      for x in (t.reshape(b.layers, *t.shape[len(b.lengths) :]) if b.axes else [t])
    ]

  def recorded(self, taps, name: str, layer: int) -> jax.Array:
    """What one layer recorded under a name."""
    return self._stacked(taps, name)[layer] if self.scanned else self._unrolled(taps, name)[layer]

  def shared(self, taps, name: str) -> jax.Array | None:
    """What the first layer recorded under a name that all have alike, or none."""
    return self.recorded(taps, name, 0) if name in taps[self.stack[0].path] else None

  def embeddings(self, taps) -> jax.Array:
    """x_0, the input of the first block, [B, N, d]."""
    return self.recorded(taps, 'x', 0)

  def each(
    self, fn: Callable[..., Any], taps, last: jax.Array, states: Sequence[int], layers
  ) -> Any:
    """fn(h, layer) for some states h [B, N, d]: a list, or stacked where the backbone is one scan.

    Nothing else happens to the states before, so that no second copy of them is wide.

    Args:
      fn: what each state goes through first, a projection.
      taps: from the call.
      last: the last state.
      states: which, ascending.
      layers: a tree of arrays that lead with an axis of the states' length, or None.
    """
    if not self.scanned:
      wide = [*self._unrolled(taps, 'x'), last]
      return [fn(wide[i], jax.tree.map(lambda x, j=j: x[j], layers)) for j, i in enumerate(states)]
    inner = [i for i in states if i < self.depth]
    stacked = self._stacked(taps, 'x')
    run = range(inner[0], inner[0] + len(inner)) if inner else range(0)
    wide = stacked[run.start : run.stop] if inner == list(run) else stacked[jnp.array(inner, int)]
    rows = [(wide, slice(0, len(inner)))] if inner else []
    rows += [(last[None], slice(len(inner), len(states)))] if len(inner) < len(states) else []
    parts = [jax.vmap(fn)(x, jax.tree.map(lambda y, at=at: y[at], layers)) for x, at in rows]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  def run(self, step, s, layers: dict) -> Any:
    """s after step(s, layer) -> s for each layer; see `scan`."""
    return self.scan(lambda s, layer: (step(s, layer), None), s, layers)[0]

  def scan(self, step, s, layers: dict) -> tuple[Any, Any]:
    """(s after all layers, what each gave beside it, stacked) of step(s, layer) -> (s, more), as
    one scan, beside unrolled blocks too: what it keeps is then stored once and narrow, where XLA
    would hold that of many layers at a time, and it compiles once.

    Args:
      step: (s, layer) -> (s, more).
      s: what is carried, such as the stream.
      layers: a tree of stacked arrays, or of lists by layer; a list of one and the same array is
        not stacked.
    """
    is_list = lambda x: isinstance(x, list)
    rows, tree = jax.tree.flatten(layers, is_leaf=is_list)
    shared = {i: x[0] for i, x in enumerate(rows) if is_list(x) and all(row is x[0] for row in x)}
    rows = [None if i in shared else jnp.stack(x) if is_list(x) else x for i, x in enumerate(rows)]

    def body(s, row):
      return step(s, jax.tree.unflatten(tree, [shared.get(i, x) for i, x in enumerate(row)]))

    return jax.lax.scan(body, s, rows)

  def last(self, call_input: jax.Array, out: jax.Array) -> jax.Array:
    """The last state, from what the exit is called with and what it returns; no gradient crosses
    it.
    """
    return jax.lax.stop_gradient(out if self.wraps_blocks else call_input)


def record(
  name: str, blocks: str, keep=lambda x: x, also=lambda site, inputs: {}, memory: str = NO_BACKPROP
) -> Method:
  """Records the input of every block, before anything else happens to it.

  Args:
    name: the method's.
    blocks: pattern of the blocks.
    keep: of the stream, such as a mean over groups of features.
    also: (site, {parameter name: array}) -> what else is recorded of what a block is called with.
    memory: the method's memory class.
  """

  def apply(t, call, *args, **kwargs):
    inputs = {n: _still(a) for n, a in call.inputs(*args, **kwargs).items()}
    wide = next(iter(inputs.values()))
    kept = keep(wide)
    if kept.shape != wide.shape and not call.site.axes and args and isinstance(args[0], jax.Array):
      # The block waits for it, lest XLA narrows after the last block and keeps all wide taps until
      # then.
      kept, first = jax.lax.optimization_barrier((kept, args[0]))
      args = (first, *args[1:])
    call.tap(x=kept, **also(call.site, inputs))
    return call(*args, **kwargs)

  return at(blocks, Call(name, apply, taps=True, memory=memory))


def _still(x: jax.Array) -> jax.Array:
  """x without gradient; what has none, such as a mask that all blocks share, stays the very same
  array.
  """
  return jax.lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def around(name: str, blocks: str, exit: str, init, apply, takes: tuple[str, ...] = ()) -> Method:
  """A method of the whole model, whose output is its own: it reads what the frozen blocks gave.

  Args:
    name: the method's.
    blocks: pattern of the blocks.
    exit: pattern of the module that their output goes to, one in the model.
    init: (net, key, site, arrays) -> t, site being the model itself.
    apply: (t, net, run, call, *args, **kwargs) -> out; run(*args, **kwargs) runs the model, frozen,
      and gives (what the blocks recorded, the last state) for `net`, the stack.
    takes: keyword arguments of `apply` that the model does not have.

  Raises:
    ValueError: at `attach`, the model has another number of exits than one, or blocks without one
      stream of tokens.
  """

  @functools.lru_cache(maxsize=256)
  def stack(model: Site) -> Stack:
    exits = [e for e in model.model.find(exit) if e.out is not None]
    if len(exits) != 1:
      raise ValueError(
        f'{name}: {exit!r} names {len(exits)} modules that are called, and one ends the stack it reads: '
        f'{", ".join(e.path for e in exits) or "none"}'
      )
    net = Stack(exits[0], blocks, exit)
    net.check_tokens(name)
    return net

  def leave(t, call, x, *args, **kwargs):
    y = call(x, *args, **kwargs)
    call.tap(last=Stack(call.site, blocks, exit).last(x, jax.tree.leaves(y)[0]))
    return y

  def whole(t, call, *args, **kwargs):
    net = stack(call.site)

    def run(*args, **kwargs):
      call(*args, **kwargs)
      taps = call.taps()
      return taps, taps[net.site.path]['last']

    return apply(t, net, run, call, *args, **kwargs)

  return chain(
    record(name, blocks),
    at(exit, Call(name, leave, taps=True, memory=NO_BACKPROP)),
    at(
      '',
      Call(
        name,
        whole,
        lambda key, site, arrays: init(stack(site), key, site, arrays),
        taps=True,
        takes=takes,
        memory=NO_BACKPROP,
      ),
    ),
  )
