"""A ladder: the side network's own blocks, one beside each of the backbone's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import Bound, Site

from ..nn import due_at_once, linear
from .blocks import SideBlock, check_block, lean_block, own_block
from .prune import check_alike, flatten, float32, prune_ladder
from .stack import Stack, called

BLOCKS = ('auto', 'own', 'attention', 'mlp')


@dataclasses.dataclass(frozen=True)
class Ladder(Stack):
  """The side network at one exit: the stack of blocks that feeds it, and its own blocks.

  theta of a ladder is {'blocks': the parameters of the side blocks, stacked, 'norm': of the narrow
  stream, and a table for each of `tables`}. Methods add the projections around them.

  Attributes:
    site, blocks, exit: see Stack.
    reduction: r; the side network's stream is as wide as the backbone's divided by r.
    kind: one of BLOCKS.
    heads: of a lean block.
    only: the layers with a side block; None for all.
  """

  reduction: int
  kind: str
  heads: int
  only: Sequence[int] | None

  # What the side network is made of, from shapes alone.

  def check(self, name: str, prune: Any) -> None:
    """Raises a ValueError where the widths cannot be divided, or nothing can be pruned."""
    self.check_tokens(name)
    if self.width % self.reduction:
      raise ValueError(
        f'reduction={self.reduction} does not divide the width {self.width} of the blocks'
      )
    takes = self.block.takes
    reads = takes is None or set(self.contexts) <= set(takes)
    if self.encoder is not None and not reads:
      raise ValueError(
        "a side decoder without attention never reads the side encoder; use block='attention'"
      )
    if prune is not None and takes is not None:
      raise ValueError("prune cuts the backbone's own blocks, and this model's cannot be narrowed")
    if prune is not None:
      check_alike(self.stack)

  @property
  def narrow(self) -> int:
    """d' = d / r, the width of the side network's stream."""
    return self.width // self.reduction

  @functools.cached_property
  def layers(self) -> tuple[int, ...]:
    """The backbone layers that have a side block, ascending."""
    return self.chosen(self.only)

  @property
  def roles(self) -> dict[str, str]:
    """{input of a block: role that makes it} for the inputs that a side network makes itself."""
    anatomy = self.site.model.anatomy
    known = {} if anatomy is None else dict(anatomy.side)
    return known | dict.fromkeys(self.contexts, 'context')

  @functools.cached_property
  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a side block's inputs, by the names of the backbone's block; the stream first."""
    inputs = self.stack[0].inputs
    stream = next(iter(inputs))
    specs = {}
    for name, spec in inputs.items():
      shape = spec.shape
      if name == stream or self.roles.get(name) == 'context':
        shape = (*shape[:-1], self.narrow)
      specs[name] = jax.ShapeDtypeStruct(shape, spec.dtype)
    return specs

  @functools.cached_property
  def block(self) -> SideBlock:
    """The side block.

    Raises:
      ValueError: kind is 'own' and the backbone's block class does not work at the narrow width, or
        the heads of a lean block do not divide that width.
    """
    site = self.stack[0]
    if self.kind in ('auto', 'own'):
      try:
        return self._own_block()
      except ValueError:
        if self.kind == 'own':
          raise
    heads = self.heads
    if self.kind == 'mlp':
      heads = 0
    return lean_block(site, heads, self.narrow, site.model.causal, self.contexts)

  def _own_block(self) -> SideBlock:
    site = self.stack[0]
    block = own_block(site, self.reduction)
    stream, inputs = _stream_first(self.specs)
    check_block(block, stream, inputs, f'the block class {site.kind} at {site.path!r}')
    return block

  @functools.cached_property
  def tables(self) -> dict[str, Site]:
    """{input of the block: the backbone's module that makes it} for the modules that the side
    network has a trained copy of, such as a table of relative positions.
    """
    model = self.site.model
    parent = _parent(self.stack[0])
    takes = self.specs if self.block.takes is None else self.block.takes
    tables = {}
    for name, role in self.roles.items():
      if name not in self.specs or name not in takes:
        continue
      if model.anatomy is None or role not in model.anatomy.roles:
        continue
      # The encoder has one table, the decoder another: the one beside the blocks is meant.
      made_by = [site for site in model.find(f'{{{role}}}') if _parent(site) == parent]
      tables[name] = made_by[0]
    return tables

  @property
  def _own_norm(self) -> bool:
    """Whether the exit is a Linen norm, whose class the side network can use."""
    shapes = {leaf.shape for leaf in self.site.leaves.values()}
    return self.site.module is not None and shapes == {(self.width,)}

  # Parameters.

  def init(self, key: jax.Array, arrays, prune: Any) -> dict:
    """theta of the ladder.

    Args:
      key: random key.
      arrays: of the exit; arrays.model are those of the whole backbone.
      prune: None for fresh blocks. For blocks cut from the backbone: 'magnitude', or a tree of
        scores like the backbone's weights.
    """
    if prune is None:
      keys = jax.random.split(key, len(self.layers))
      side = jax.jit(jax.vmap(self.fresh))(keys)
      kept = None
    else:
      scores = arrays.model if prune == 'magnitude' else flatten(prune)
      pruned, kept = prune_ladder(self, arrays.model, scores)
      side = jax.tree.map(lambda *rows: jnp.stack(rows), *pruned)
    t = {'blocks': side}
    if not self.wraps_blocks:  # blocks that end with a norm need none after the last
      t['norm'] = self._init_norm(arrays, kept)
    for name, site in self.tables.items():
      t[name] = float32({n: arrays.model[f'{site.path}/{n}'] for n in site.leaves})
    return t

  def fresh(self, key: jax.Array) -> Any:
    """The parameters of one side block, by the initialisers of its class."""
    zeros = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in self.specs.items()}
    stream, inputs = _stream_first(zeros)
    return float32(self.block.init(key, stream, inputs))

  def _init_norm(self, arrays, kept: jax.Array | None) -> dict:
    """The parameters of the last norm, at `kept` channels of the backbone's where it is pruned."""
    if not self._own_norm:
      return {'scale': jnp.ones(self.narrow)}
    if kept is None:
      variables = self.site.module.init(jax.random.key(0), jnp.zeros((1, self.narrow)))
      return float32(variables['params'])
    wide = {name: arrays.model[f'{self.site.path}/{name}'] for name in self.site.leaves}
    return float32({name: jnp.take(x, kept) for name, x in wide.items()})

  # The forward pass.

  def further(self, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays that a backbone's block is called with and its side block needs too.

    Args:
      inputs: by parameter name, the stream first.
    """
    takes = self.block.takes
    _, others = _stream_first(inputs)
    needed = {}
    for name, x in others.items():
      if name not in self.roles and (takes is None or name in takes):
        needed[name] = x
    return needed

  def narrowed(self, taps, last: jax.Array, down: Any) -> list[jax.Array] | jax.Array:
    """What each side layer reads: D_i h_i + c_i, or the pooled h_i, [B, N, d'] a layer.

    Args:
      taps: from the call.
      last: the last hidden state, pooled if the taps are.
      down: {'kernel': [layers, d, d'], 'bias': [layers, d']} or None for pooled taps.
    """

    def project(h, layer):
      return h if layer is None else linear(layer, h)

    return self.each(project, taps, last, self.states, down)

  @property
  def states(self) -> list[int]:
    """The states h_i that the side layers read: the outputs of their blocks."""
    return [i + 1 for i in self.layers]

  def climb(
    self,
    call: Bound,
    t,
    s: jax.Array,
    mix: Callable[[jax.Array, dict], jax.Array],
    rows: dict,
    key: jax.Array | None,
    remat: bool,
  ) -> jax.Array:
    """The stream after all side blocks and the norm behind them, [B, N, d'].

    Where the model's collection 'cache' is mutable, the keys and values of side blocks are stored
    there too.

    Args:
      call: of the exit.
      t: what `init` gave.
      s: the initial stream [B, N, d'].
      mix: (s, layer of rows) -> what the layer's side block reads.
      rows: a tree of stacked arrays, or of lists by layer.
      key: for dropout in the side blocks; None for none.
      remat: recompute the side blocks in the backward pass.
    """
    cache = call.read_cache()
    with call.outside():
      made = self.made_inputs(t, call.taps(), s.shape[1])
    layers = {'block': t['blocks'], 'inputs': self.inputs(call.taps()), **rows}
    if cache is not None:
      layers['cache'] = cache
    if key is not None:
      layers['key'] = jax.random.split(key, len(self.layers))

    def step(s, layer):
      inputs = {**layer['inputs'], **made}
      with call.outside():
        out, layer_cache = self.block.run(
          layer['block'], mix(s, layer), inputs, call.training, layer.get('key'), layer.get('cache')
        )
      return out.astype(s.dtype), layer_cache

    if remat:
      # Inside a scan XLA cannot merge the second computation with the first: no barrier is needed.
      step = jax.checkpoint(step, prevent_cse=False)
    s, new_cache = self.scan(step, s, layers)
    # A block that mixes tokens and stores no keys and values cannot go on from a text's beginning:
    # without an entry in the cache, generation runs the text as a whole.
    if cache is not None and (jax.tree.leaves(new_cache) or not self.block.mixes):
      call.write_cache(new_cache)
    with call.outside():
      return self.norm(t, s)

  def inputs(self, taps) -> dict[str, Any]:
    """The further inputs of the side blocks, recorded beside the stream."""
    inputs = {}
    for name in taps[self.stack[0].path]:
      if name == 'x':
        continue
      rows = self.by_layer(taps, name)
      if self.scanned:
        inputs[name] = rows[jnp.array(self.layers)]
      else:
        inputs[name] = [rows[i] for i in self.layers]
    return inputs

  def made_inputs(self, t, taps, length: int) -> dict[str, jax.Array]:
    """The inputs of the side blocks that the side network makes itself, alike for all layers."""
    made = {}
    for name, site in self.tables.items():
      made[name] = site.module.apply({'params': t[name]}, length, length)
    if self.encoder is None:
      return made
    for name, role in self.roles.items():
      if role == 'context' and name in self.specs:
        made[name] = taps[self.encoder.path]['side']
    return made

  def norm(self, t, s: jax.Array) -> jax.Array:
    """The norm after the last side block, where blocks do not end with one."""
    if 'norm' not in t:
      return s
    module = self.site.module if self._own_norm else nn.RMSNorm(dtype=s.dtype)
    params, s = due_at_once(t['norm'], s)
    return module.apply({'params': params}, s)


def _stream_first(inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """(the stream, the other inputs) of what a block is called with; the stream is the first."""
  (_, stream), *others = inputs.items()
  return stream, dict(others)


def _parent(site: Site) -> str:
  return site.path.rpartition('/')[0]


@functools.lru_cache(maxsize=256)
def ladder_at(
  site: Site,
  blocks: str,
  exit: str,
  reduction: int,
  kind: str,
  heads: int,
  only: tuple[int, ...] | None,
) -> Ladder:
  """The `Ladder` at an exit. Every trace asks for it, and its side block is tried on shapes only
  once.
  """
  return Ladder(site, blocks, exit, reduction, kind, heads, only)


def ladder_beside(block: Site, exit: str, ladder: Callable[[Site], Ladder]) -> Ladder:
  """The ladder that a block of the backbone feeds.

  Args:
    block: the block.
    exit: pattern of the exits.
    ladder: exit -> the ladder there.

  Raises:
    ValueError: the block lies before no exit.
  """
  for site in called(block, exit):
    found = ladder(site)
    if block in found.stack:
      return found
  raise ValueError(f'the block {block.path!r} lies before none of the exits {exit!r}')
