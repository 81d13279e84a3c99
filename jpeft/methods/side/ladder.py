"""A ladder: the side network's own blocks, one beside each of the backbone's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jpeft.core import Bound, Site

from ..nn import linear
from . import blocks
from .prune import keep_count, keep_rows, prune_block
from .stack import Stack


@dataclasses.dataclass(frozen=True)
class Ladder(Stack):
  """The side network at one exit: the stack of blocks that feeds it, and its shapes.

  Attributes:
    reduction: r.
    kind: 'auto', 'own', 'attention' or 'mlp'.
    heads: of a lean block.
    only: the layers with a side block; None for all.
  """

  reduction: int
  kind: str
  heads: int
  only: Sequence[int] | None

  @property
  def narrow(self) -> int:
    return self.width // self.reduction

  @functools.cached_property
  def layers(self) -> tuple[int, ...]:
    """The backbone layers that have a side block, ascending."""
    return self.chosen(self.only)

  @functools.cached_property
  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a side block's inputs: the stream first, then what the backbone's block is called
    with.
    """
    block, anatomy = self.stack[0], self.site.model.anatomy
    first, *others = block.inputs
    narrow = lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], self.narrow), x.dtype)
    own = dict(anatomy.side) if anatomy else {}
    specs = {first: narrow(block.inputs[first])}
    for name in others:
      spec = block.inputs[name]
      specs[name] = narrow(spec) if own.get(name) == 'context' else spec
    return specs

  @functools.cached_property
  def block(self) -> blocks.SideBlock:
    """The side block."""
    stream, *others = self.specs
    s, inputs = self.specs[stream], {n: self.specs[n] for n in others}
    anatomy = self.site.model.anatomy
    if self.kind in ('auto', 'own'):
      try:
        block = blocks.own(self.stack[0], self.reduction)
        blocks.check(
          block, s, inputs, f'the block class {self.stack[0].kind} at {self.stack[0].path!r}'
        )
        return block
      except ValueError:
        if self.kind == 'own':
          raise
    heads = 0 if self.kind == 'mlp' else self.heads
    return blocks.lean(self.stack[0], heads, self.narrow, bool(anatomy and anatomy.causal))

  def further(self, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Of the arrays that a backbone's block is called with, those that its side block needs too."""
    anatomy, takes = self.site.model.anatomy, self.block.takes
    own = dict(anatomy.side) if anatomy else {}
    others = list(inputs)[1:]
    return {n: inputs[n] for n in others if n not in own and (takes is None or n in takes)}

  @functools.cached_property
  def _zeros(self) -> tuple[jax.Array, dict[str, jax.Array]]:
    stream, *others = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.specs.values()]
    return stream, dict(zip(list(self.specs)[1:], others, strict=True))

  def _fresh(self, key) -> Any:
    """The parameters of one side block, by the initialisers of its class."""
    stream, inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._zeros)
    return _float32(self.block.init(key, stream, inputs))

  def init(self, key, arrays, prune) -> dict:
    """{'blocks': with a leading layer axis, 'norm': of the narrow stream, further own tables}."""
    if prune is None:
      blocks, kept = jax.jit(jax.vmap(self._fresh))(jax.random.split(key, len(self.layers))), None
    else:
      pruned, kept = self._pruned(arrays, arrays.model if prune == 'magnitude' else _flat(prune))
      blocks = jax.tree.map(lambda *x: jnp.stack(x), *pruned)
    tables = {
      n: {k: arrays.model[f'{s.path}/{k}'].astype(jnp.float32) for k in s.leaves}
      for n, s in self.tables.items()
    }
    return {'blocks': blocks, **self._init_norm(arrays, kept), **tables}

  def _init_norm(self, arrays, kept) -> dict:
    if self.wraps_blocks:
      return {}  # blocks that end with a norm need none after the last
    if not self._own_norm:
      return {'norm': {'scale': jnp.ones(self.narrow)}}
    if kept is None:
      return {
        'norm': _float32(
          self.site.module.init(jax.random.key(0), jnp.zeros((1, self.narrow)))['params']
        )
      }
    wide = {n: arrays.model[f'{self.site.path}/{n}'] for n in self.site.leaves}
    return {'norm': {n: jnp.take(x, kept).astype(jnp.float32) for n, x in wide.items()}}

  @property
  def _own_norm(self) -> bool:
    """Whether the exit is a Linen norm, whose class the side network can use."""
    shapes = {leaf.shape for leaf in self.site.leaves.values()}
    return self.site.module is not None and shapes == {(self.width,)}

  def norm(self, t, s: jax.Array) -> jax.Array:
    """The norm after the last side block, where blocks do not end with one."""
    if 'norm' not in t:
      return s
    module = self.site.module if self._own_norm else nn.RMSNorm(dtype=s.dtype)
    return module.apply({'params': t['norm']}, s)

  @functools.cached_property
  def tables(self) -> dict[str, Site]:
    """{input of the block: the module that makes it} for what the side network makes by a copy of
    its own, such as a relative position bias."""
    anatomy = self.site.model.anatomy
    prefix = self.stack[0].path.rpartition('/')[0]
    takes = self.specs if self.block.takes is None else self.block.takes
    roles = {
      n: r
      for n, r in (anatomy.side if anatomy else {}).items()
      if r in anatomy.roles and n in self.specs and n in takes
    }
    return {
      n: next(s for s in self.site.model.find(f'{{{r}}}') if s.path.rpartition('/')[0] == prefix)
      for n, r in roles.items()
    }

  def context(self, t, taps, length: int) -> dict[str, jax.Array]:
    """The inputs of the side blocks that the side network makes itself."""
    made = {
      n: site.module.apply({'params': t[n]}, length, length) for n, site in self.tables.items()
    }
    anatomy = self.site.model.anatomy
    for name, role in (anatomy.side if anatomy else {}).items():
      if (
        role == 'context'
        and name in self.specs
        and len(self.exits) > 1
        and self.exits[0] is not self.site
      ):
        made[name] = taps[self.exits[0].path]['side']
    return made

  def _pruned(self, arrays, scores) -> tuple[list, jax.Array]:
    """(the narrow blocks, the indices of the stream that the last one keeps)."""
    shapes = traverse_util.flatten_dict(jax.eval_shape(self._fresh, jax.random.key(0)), sep='/')
    kept, blocks = self._kept_before(arrays, scores), []
    for i in self.layers:
      block, layer = self.layer(i)
      inside = {
        s.path[len(block.path) + 1 :]: s
        for s in self.site.model.values()
        if s.leaves and s.path.startswith(f'{block.path}/')
      }
      of_layer = lambda flat, layer=layer, inside=inside: {
        s.path: {
          n: s.stack_first(flat[f'{s.path}/{n}']).reshape(-1, *leaf.shape)[layer]
          for n, leaf in s.leaves.items()
        }
        for s in inside.values()
      }
      narrow = {
        s.path: {n: shapes[f'{local}/{n}'].shape for n in s.leaves} for local, s in inside.items()
      }
      pruned, kept = prune_block(
        list(inside.values()), of_layer(arrays.model), of_layer(scores), narrow, kept
      )
      flat = {f'{local}/{n}': x for local, s in inside.items() for n, x in pruned[s.path].items()}
      blocks.append(_float32(traverse_util.unflatten_dict(flat, sep='/')))
    return blocks, kept

  def _kept_before(self, arrays, scores) -> jax.Array:
    """What the first block keeps of its input: the best columns of the embedding, or in a decoder
    what the encoder kept last."""
    position = self.exits.index(self.site)
    if position:
      return dataclasses.replace(self, site=self.exits[position - 1])._pruned(arrays, scores)[1]
    model = self.site.model
    tables = [
      f'{s.path}/{n}'
      for s in model.find('(?:{embed})(?:/.*)?')
      for n, leaf in s.leaves.items()
      if leaf.use in ('gather', 'conv_general_dilated') and leaf.shape[-1] == self.width
    ]
    if not tables:
      raise ValueError("prune: found no embedding of the blocks' width at the role {embed}")
    columns = jnp.sum(jnp.abs(scores[tables[0]]).reshape(-1, self.width), 0)
    return keep_rows(columns, keep_count(self.width, self.reduction))

  def narrowed(self, taps, last: jax.Array, down) -> list[jax.Array] | jax.Array:
    """What each side layer reads: D_i h_i + c_i, or the pooled h_i, [B, N, d'] a layer.

    h_i, the output of block i, was recorded as the input of block i + 1; the last is the exit's.
    All are projected before anything else happens, so that no second copy of them is wide.

    Args:
      taps: from the call.
      last: the last hidden state, pooled if the taps are.
      down: {'kernel': [layers, d, d'], 'bias': [layers, d']} or None for pooled taps.
    """
    project = lambda h, layer: h if layer is None else linear(layer, h)
    return self.each(project, taps, last, [i + 1 for i in self.layers], down)

  def climb(
    self,
    call: Bound,
    t,
    s: jax.Array,
    mix: Callable[[jax.Array, dict], jax.Array],
    rows: dict,
    key,
    remat: bool,
  ) -> jax.Array:
    """The stream after all side blocks and the norm behind them, [B, N, d'].

    Where the model's collection 'cache' is mutable, side blocks that keep keys and values keep them
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
    held = call.read_cache()
    with call.outside():
      context = self.context(t, call.taps(), s.shape[1])

    def step(s, layer):
      inputs = {**layer['inputs'], **context}
      with call.outside():
        out, cache = self.block.run(
          layer['block'], mix(s, layer), inputs, call.training, layer.get('key'), layer.get('cache')
        )
      return out.astype(s.dtype), cache

    s, cache = self.scan(
      jax.checkpoint(step, prevent_cse=False) if remat else step,
      s,
      {
        'block': t['blocks'],
        'inputs': self.inputs(call.taps()),
        **rows,
        **({} if held is None else {'cache': held}),
        **({} if key is None else {'key': jax.random.split(key, len(self.layers))}),
      },
    )
    if held is not None and (
      jax.tree.leaves(cache) or not self.block.mixes
    ):  # else a text has to be run as a whole
      call.write_cache(cache)
    with call.outside():
      return self.norm(t, s)

  def inputs(self, taps) -> dict:
    """The further inputs of the side blocks, recorded beside the stream."""
    names = [n for n in taps[self.stack[0].path] if n != 'x']
    if self.scanned:
      return {n: self._stacked(taps, n)[jnp.array(self.layers)] for n in names}
    rows = {n: self._unrolled(taps, n) for n in names}
    return {n: [rows[n][i] for i in self.layers] for n in names}

  def check(self, name: str, prune) -> None:
    """Raises a ValueError where the widths cannot be divided, or nothing can be pruned."""
    self.check_tokens(name)
    if self.width % self.reduction:
      raise ValueError(
        f'reduction={self.reduction} does not divide the width {self.width} of the blocks'
      )
    reads = self.block.takes is None or 'context' in self.block.takes
    if self.is_last and len(self.exits) > 1 and not reads:
      raise ValueError(
        "a side decoder without attention never reads the side encoder; use block='attention'"
      )
    if prune is not None and self.block.takes is not None:
      raise ValueError("prune cuts the backbone's own blocks, and this model's cannot be narrowed")


def _float32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _flat(scores) -> dict:
  return traverse_util.flatten_dict(dict(scores.get('params', scores)), sep='/')
