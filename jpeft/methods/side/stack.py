"""What side methods share: which blocks feed a side network, and how their states are recorded and
read.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, natural

from ..masks import conditions


def called(site: Site, pattern: str) -> list[Site]:
  """The sites of a model that match a pattern and that the forward pass calls."""
  return [found for found in site.model.find(pattern) if found.out is not None]


@dataclasses.dataclass(frozen=True)
class Stack:
  """The blocks before one exit, and how to read what was recorded of them.

  State 0 is the embeddings x_0, state i the residual stream after i blocks. The tap of a block is
  its input, so that the taps are all states but the last, which is read at the exit.

  `taps` is {path of a block: {name: array}}, from `call.taps()`. Arrays of a scanned block lead
  with the axes of the scan.

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
    """All exits of the model; an encoder-decoder has two."""
    return called(self.site, self.exit)

  @functools.cached_property
  def encoder(self) -> Site | None:
    """The exit whose last state the blocks of this stack attend to; None for any but a decoder."""
    earlier = self.exits[: self.exits.index(self.site)]
    if not earlier or not self.contexts:
      return None
    for exit in earlier:
      if any(_is_state(self.stack[0].sources.get(name), exit) for name in self.contexts):
        return exit
    return earlier[0]

  @functools.cached_property
  def contexts(self) -> list[str]:
    """The inputs of the blocks that are the states of an encoder.

    The trace shows those that come straight from an encoder's exit; the model's family, or the name
    'context', the others.
    """
    return contexts_of(self.stack[0], self.exits)

  @functools.cached_property
  def is_last(self) -> bool:
    """Whether this exit makes a prediction; that of an encoder feeds the decoder's.

    Of two towers each makes its own.
    """
    others = [dataclasses.replace(self, site=exit) for exit in self.exits if exit is not self.site]
    return all(other.encoder is not self.site for other in others)

  @functools.cached_property
  def stack(self) -> list[Site]:
    """The blocks before the exit, in order.

    Raises:
      ValueError: there is none.
    """
    blocks = sorted(called(self.site, self.blocks), key=lambda block: natural(block.path))
    within = [block for block in blocks if block.path.startswith(f'{self.site.path}/')]
    if within:
      return within
    # An exit such as a final norm runs no blocks: they are elsewhere in the module around it.
    parent = self.site.path[: self.site.path.rfind('/') + 1]
    beside = [block for block in blocks if f'{block.path}/'.startswith(parent)]
    if not beside:
      raise ValueError(
        f'no block that {self.blocks!r} names lies before the exit {self.site.path!r}'
      )
    return beside

  @property
  def wraps_blocks(self) -> bool:
    """Whether the exit runs the blocks itself (their last output is its output)."""
    return self.stack[0].path.startswith(f'{self.site.path}/')

  @property
  def scanned(self) -> bool:
    """Whether all blocks are one stacked module, so that their taps come as one array."""
    return len(self.stack) == 1 and bool(self.stack[0].axes)

  @property
  def depth(self) -> int:
    """How many layers the blocks stand for."""
    return sum(block.layers for block in self.stack)

  @property
  def width(self) -> int:
    """d, of the residual stream."""
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
    """Some of the first `depth` layers (all of the stack's by default), ascending.

    Args:
      layers: indices of layers; None for all.
      depth: how many layers there are to choose from.

    Raises:
      ValueError: there are no such layers.
    """
    if depth is None:
      depth = self.depth
    if layers is None:
      layers = range(depth)
    layers = tuple(sorted(layers))
    if not layers or min(layers) < 0 or max(layers) >= depth:
      raise ValueError(
        f'layers={list(layers)} must name some of the {depth} blocks 0 to {depth - 1} '
        f'before {self.site.path!r}'
      )
    return layers

  def layer(self, i: int) -> tuple[Site, int]:
    """(the block that layer i belongs to, the layer's index in that block's stack)."""
    index = i
    for block in self.stack:
      if index < block.layers:
        return block, index
      index -= block.layers
    raise IndexError(i)

  def by_layer(self, taps, name: str) -> jax.Array | list[jax.Array]:
    """What every layer recorded under a name: [layers, ...] of a scanned stack, else a list."""
    if self.scanned:
      (block,) = self.stack
      return _layers_first(block, taps[block.path][name])
    rows = []
    for block in self.stack:
      tap = taps[block.path][name]
      if block.axes:
        rows.extend(_layers_first(block, tap))
      else:
        rows.append(tap)
    return rows

  def recorded(self, taps, name: str, layer: int) -> jax.Array:
    """What one layer recorded under a name."""
    return self.by_layer(taps, name)[layer]

  def beside(self, taps, layer: int) -> Any:
    """What one layer was called with beside its stream, as `call.beside` gave it to the taps."""
    block, index = self.layer(layer)
    tap = taps[block.path]['beside']
    if not block.axes:
      return tap
    return jax.tree.map(lambda x: _layers_first(block, x)[index], tap)

  def shared(self, taps, name: str) -> jax.Array | None:
    """A recorded value that is the same for every block (such as the attention mask); None if
    nothing was recorded.
    """
    if name not in taps[self.stack[0].path]:
      return None
    return self.recorded(taps, name, 0)

  def embeddings(self, taps) -> jax.Array:
    """x_0, the input of the first block, [B, N, d]."""
    return self.recorded(taps, 'x', 0)

  def each(
    self,
    fn: Callable[[jax.Array, Any], Any],
    taps,
    last: jax.Array,
    states: Sequence[int],
    layers: Any,
  ) -> Any:
    """fn(h, layer) for some states h [B, N, d]: stacked if the backbone is one scan, else a list.

    fn reads the states as they were recorded: they are never copied at full width.

    Args:
      fn: what each state goes through first, a projection.
      taps: from the call.
      last: the last state.
      states: their indices, ascending.
      layers: the parameters of fn, a tree of arrays [len(states), ...], or None.
    """
    if not self.scanned:
      wide = [*self.by_layer(taps, 'x'), last]
      outs = []
      for position, state in enumerate(states):
        layer = jax.tree.map(lambda x, position=position: x[position], layers)
        outs.append(fn(wide[state], layer))
      return outs
    tapped = [state for state in states if state < self.depth]
    count = len(tapped)
    parts = []
    if tapped:
      wide = _rows(self.by_layer(taps, 'x'), tapped)
      parts.append(jax.vmap(fn)(wide, jax.tree.map(lambda x: x[:count], layers)))
    if count < len(states):
      parts.append(jax.vmap(fn)(last[None], jax.tree.map(lambda x: x[count:], layers)))
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)

  def run(self, step: Callable[[Any, Any], Any], s: Any, layers: Any) -> Any:
    """s after step(s, layer) -> s for each layer; see `scan`."""
    s, _ = self.scan(lambda s, layer: (step(s, layer), None), s, layers)
    return s

  def scan(self, step: Callable[[Any, Any], tuple], s: Any, layers: Any) -> tuple[Any, Any]:
    """Runs the layers of a side network as one scan, also beside unrolled blocks.

    The scan compiles once, and stores what the backward pass needs of a layer as soon as the layer
    is done. Of unrolled layers XLA would keep full-width values of many at a time.

    Args:
      step: (s, layer) -> (s, out).
      s: what is carried, such as the stream.
      layers: a tree of stacked arrays, or of lists by layer.

    Returns:
      (s after all layers, out of all layers, stacked).
    """
    leaves, tree = jax.tree.flatten(layers, is_leaf=lambda x: isinstance(x, list))
    stacked = {}
    shared = {}  # one array for all layers, such as a mask, is not stored once a layer
    for i, leaf in enumerate(leaves):
      if not isinstance(leaf, list):
        stacked[i] = leaf
      elif all(row is leaf[0] for row in leaf):
        shared[i] = leaf[0]
      else:
        stacked[i] = jnp.stack(leaf)

    def body(s, row):
      row = {**shared, **row}
      return step(s, jax.tree.unflatten(tree, [row[i] for i in range(len(leaves))]))

    return jax.lax.scan(body, s, stacked)

  def last(self, call_input: jax.Array, out: jax.Array) -> jax.Array:
    """The last state, under stop_gradient.

    Args:
      call_input: what the exit is called with.
      out: what it returns.
    """
    state = out if self.wraps_blocks else call_input
    return jax.lax.stop_gradient(state)


def _layers_first(block: Site, tap: jax.Array) -> jax.Array:
  """A tap of a scanned block, its axes of the scan folded into one: [layers, ...]."""
  return tap.reshape(block.layers, *tap.shape[len(block.lengths) :])


def _rows(x: jax.Array, indices: Sequence[int]) -> jax.Array:
  """Some rows of x, the indices ascending."""
  first, last = indices[0], indices[-1]
  if last - first + 1 == len(indices):
    return x[first : last + 1]  # XLA reads a slice in place, where it would copy a gather
  return x[jnp.array(indices)]


def record(
  name: str,
  blocks: str,
  keep: Callable[[jax.Array], jax.Array] = lambda x: x,
  also: Callable[..., Mapping[str, jax.Array]] = lambda site, inputs: {},
  memory: str = NO_BACKPROP,
  beside: Callable[[Site], Collection[str]] | None = None,
) -> Method:
  """A method that records the input of every block, under stop_gradient, as the tap `x`.

  Args:
    name: the method's.
    blocks: pattern of the blocks.
    keep: what is recorded of the stream, such as means over groups of features.
    also: (site, {parameter name: array}) -> what else is recorded of what a block is called with.
    memory: the method's memory class.
    beside: for blocks that run again, site -> the parameters that are given there; what else a
      block is called with beside its stream is recorded as the tap `beside`.
  """

  def apply(t, call, *args, **kwargs):
    inputs = {n: stop_gradient(x) for n, x in call.inputs(*args, **kwargs).items()}
    for mask in conditions(call, args, kwargs):
      inputs[mask] = inputs[mask] != 0  # floats that are recorded are biases
    stream = next(iter(inputs.values()))
    tap = keep(stream)
    pooled = tap.shape != stream.shape
    if pooled and not call.site.axes and args and isinstance(args[0], jax.Array):
      # Makes the block depend on the pooled tap. Without this XLA may pool all taps after the last
      # block and keep every full-width one alive until then.
      tap, first = jax.lax.optimization_barrier((tap, args[0]))
      args = (first, *args[1:])
    further = dict(also(call.site, inputs))
    if beside is not None:
      around = call.beside(args, kwargs, beside(call.site))
      further['beside'] = jax.tree.map(stop_gradient, around)
    call.tap(x=tap, **further)
    return call(*args, **kwargs)

  return at(blocks, Call(name, apply, taps=True, memory=memory))


def contexts_of(block: Site, exits: Sequence[Site]) -> list[str]:
  """The inputs of a block that are the states of an encoder.

  Args:
    block: of a decoder, say.
    exits: where stacks end.
  """
  roles = {} if block.model.anatomy is None else block.model.anatomy.side
  found = []
  for name in list(block.inputs)[1:]:  # the stream comes first
    is_known = name == 'context' or roles.get(name) == 'context'
    if is_known or any(_is_state(block.sources.get(name), exit) for exit in exits):
      found.append(name)
  return found


def _is_state(source: str | None, exit: Site) -> bool:
  """Whether a module returns the output of an exit: it is the exit, or ends with it."""
  if not source:
    return False
  return f'{exit.path}/'.startswith(f'{source}/')


def stop_gradient(x: jax.Array) -> jax.Array:
  """x without gradient. An array of integers or booleans has none and is returned as the same
  object, by which `Stack.scan` sees that all blocks share a mask.
  """
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return x
  return jax.lax.stop_gradient(x)


def around(
  name: str,
  blocks: str,
  exit: str,
  init: Callable[..., Any],
  apply: Callable[..., Any],
  takes: tuple[str, ...] = (),
) -> Method:
  """A method of the whole model, which reads the states of the frozen blocks and makes the output.

  Args:
    name: the method's.
    blocks: pattern of the blocks.
    exit: pattern of the module that their output goes to, one in the model.
    init: (net, key, site, arrays) -> t; `net` is the stack, `site` the model itself.
    apply: (t, net, run, call, *args, **kwargs) -> out. run(*args, **kwargs) runs the frozen model
      and returns (what the blocks recorded, the last state), which `net` reads.
    takes: keyword arguments of `apply` that the model does not have.

  Raises:
    ValueError: at `attach`, the model has another number of exits than one, or blocks without one
      stream of tokens.
  """
  return _Around(name, blocks, exit, init, apply, takes).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _Around:
  name: str
  blocks: str
  exit: str
  init: Callable[..., Any]
  apply: Callable[..., Any]
  takes: tuple[str, ...]

  def method(self) -> Method:
    model = Call(
      self.name,
      self.apply_model,
      self.init_model,
      taps=True,
      takes=self.takes,
      memory=NO_BACKPROP,
    )
    return chain(
      record(self.name, self.blocks),
      at(self.exit, Call(self.name, self.apply_exit, taps=True, memory=NO_BACKPROP)),
      at('', model),
    )

  def stack(self, model: Site) -> Stack:
    """The stack before the model's one exit."""
    exits = called(model, self.exit)
    if len(exits) != 1:
      paths = ', '.join(site.path for site in exits) or 'none'
      raise ValueError(
        f'{self.name}: {self.exit!r} names {len(exits)} modules that are called, and one ends '
        f'the stack it reads: {paths}'
      )
    net = Stack(exits[0], self.blocks, self.exit)
    net.check_tokens(self.name)
    return net

  def init_model(self, key, site, arrays):
    return self.init(self.stack(site), key, site, arrays)

  def apply_exit(self, t, call, x, *args, **kwargs):
    """Records the last state."""
    y = call(x, *args, **kwargs)
    net = Stack(call.site, self.blocks, self.exit)
    call.tap(last=net.last(x, call.site.stream(y)))
    return y

  def apply_model(self, t, call, *args, **kwargs):
    """Runs the method in place of the model."""
    net = self.stack(call.site)

    def run(*args, **kwargs):
      call(*args, **kwargs)
      taps = call.taps()
      return taps, taps[net.site.path]['last']

    return self.apply(t, net, run, call, *args, **kwargs)
