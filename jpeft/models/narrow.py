"""Narrow models: fewer blocks, heads, hidden units and words, cut out of a model and its weights.

The residual stream keeps its width. A cut head or hidden unit adds nothing to it, so that the
narrow model computes what the wide one would compute with zeros in the cut places.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Box, Site, Sites, backend_of, join_path, leaf_paths, sites_of
from jpeft.cutting import Indices, cut_map, kernel_of, spans
from jpeft.messages import did_you_mean

from .bert import BERT_SIZES
from .llama import LLAMA_SIZES
from .sizes import Sized, Sizes
from .t5 import T5_SIZES
from .vit import VIT_SIZES

_FAMILIES: tuple[Sized, ...] = (VIT_SIZES, BERT_SIZES, T5_SIZES, LLAMA_SIZES)


@dataclasses.dataclass(frozen=True, eq=False)
class Keep:
  """What a narrow model keeps of a wide one; what is left out is kept whole.

  Layers, heads, hidden units and words are numbered from 0 on as in the wide model, and numbers
  ascend. A sequence, a numpy array or a jax array will do.

  Attributes:
    layers: the blocks that stay.
    heads: {layer: heads of self-attention that stay}. Where groups of query heads share a key head,
      these are key heads, and each goes with its group.
    mlp: {layer: hidden units of the MLP that stay}.
    vocabulary: the words that stay. A word's new id is its place in this sequence.
    cross_heads: {layer: heads of cross-attention that stay}, in a decoder that has it.
    decoder: the same for the decoder of a T5; the other fields are then of its encoder.
  """

  layers: Sequence[int] | None = None
  heads: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
  mlp: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
  vocabulary: Sequence[int] | None = None
  cross_heads: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
  decoder: 'Keep | None' = None


def narrowed(model, backbone, keep: Keep) -> tuple[Any, Any]:
  """(a model, its backbone) with some of the layers, heads, hidden units and words of another.

  A scanned model stays scanned if its blocks stay alike. Else the narrow model is unrolled
  (scan=False), and layers are no longer stacked in its backbone.

  Args:
    model: a ViT, Bert, T5 or Llama of jpeft.models; it is read, never changed.
    backbone: its variables; under jax.eval_shape nothing is computed.
    keep: what stays. Arrays that are not cut are shared with the wide backbone.

  Raises:
    TypeError: another model.
    ValueError: numbers that do not ascend, that there are not, or that leave nothing; kernels in 4
      bits; or variables other than params.

  Example:
    >>> keep = jpeft.Keep(layers=(0, 2), heads={0: (1,)})  # doctest: +SKIP
    >>> model, variables = jpeft.narrowed(model, variables, keep)  # doctest: +SKIP
  """
  family = _family_of(model)
  _check_backbone(model, backbone)
  plan = _plan(family, model, keep)
  arrays = backend_of(model).arrays(model, backbone)
  params = {}
  for path, site in plan.narrow.items():
    if site.leaves:
      layers = [_cut(source, site, arrays) for source in plan.sources[path]]
      for name in site.leaves:
        params[join_path(path, name)] = _stacked(site, [layer[name] for layer in layers])
  return plan.model, backend_of(model).replace(plan.model, plan.shapes, params)


# What is cut where.


class _Source(NamedTuple):
  """Where one layer of a narrow module comes from.

  Attributes:
    site: the wide module.
    layer: index in its stack.
    ins: inputs of its linear map that stay, or rows of its table; None for all.
    outs: outputs that stay; None for all.
  """

  site: Site
  layer: int = 0
  ins: Indices = None
  outs: Indices = None


class _Plan(NamedTuple):
  """A narrow model, and where its modules come from.

  Attributes:
    model: the narrow model.
    shapes: its variables, as shapes.
    narrow: its sites.
    sources: {path of a narrow site: the source of each layer of its stack}.
  """

  model: Any
  shapes: Any
  narrow: Sites
  sources: dict[str, list[_Source]]


class _Block(NamedTuple):
  """What stays of a block; all of it where there is None.

  Attributes:
    number: of the block in the wide stack.
    heads: key and value heads of each attention, self-attention first.
    counts: how many there were of each.
    mlp: hidden units.
  """

  number: int
  heads: tuple[Indices, ...]
  counts: tuple[int, ...]
  mlp: Indices


def _family_of(model) -> Sized:
  for family in _FAMILIES:
    if isinstance(model, family.kind):
      return family
  known = ', '.join(family.kind.__name__ for family in _FAMILIES)
  raise TypeError(
    f'narrow models are made of {known}, whose sizes jpeft knows; got {type(model).__name__}'
  )


def _check_backbone(model, backbone) -> None:
  """Raises a ValueError for a backbone that cannot be cut."""
  for path, array in backend_of(model).arrays(model, backbone).items():
    if isinstance(array, Box):
      raise ValueError(
        f'{path!r} is stored as {type(array).__name__}, which cannot be cut: narrow the model, '
        'then quantize it'
      )
  others = sorted(set(backbone) - {'params'})
  if others:
    raise ValueError(
      f'only params are narrowed, and the variables also have {", ".join(others)}: give '
      "{'params': variables['params']}"
    )


def _plan(family: Sized, model, keep: Keep) -> _Plan:
  wide_sizes = family.sizes(model)
  parts = _parts(keep, wide_sizes)
  blocks = {stack: _blocks(parts[stack], sizes, stack) for stack, sizes in wide_sizes.items()}
  words = None
  if keep.vocabulary is not None:
    if not family.words:
      raise ValueError(f'vocabulary: a {family.kind.__name__} reads no words')
    words = _indices('vocabulary', keep.vocabulary, model.vocab, 'words')
    _check_padding(model, keep.vocabulary)

  columns = {}
  sizes = {}
  for stack, whole in wide_sizes.items():
    columns[stack] = _columns(whole, blocks[stack])
    sizes[stack] = _narrow_sizes(whole, blocks[stack], columns[stack])
  narrow_model = family.resized(model, sizes, None if words is None else len(words))
  narrow_model = narrow_model.clone(scan=model.scan and all(s.alike for s in sizes.values()))
  _, wide = _traced(family, model)
  shapes, narrow = _traced(family, narrow_model)

  wide_blocks = _by_layer(family, wide)
  sources: dict[str, list[_Source]] = {path: [] for path in narrow}
  for (stack, number), (path, _) in _by_layer(family, narrow).items():
    block = blocks[stack][number]
    wide_path, layer = wide_blocks[stack, block.number]
    for local in _inside(narrow, path):
      source = wide[wide_path + local]
      ins, outs = _block_cut(family, wide, wide_path, source, block)
      sources[path + local].append(_Source(source, layer, ins, outs))
  for path, found in sources.items():
    if not found:
      found.append(_source_outside(family, wide[path], words, columns))
  return _Plan(narrow_model, shapes, narrow, sources)


def _parts(keep: Keep, sizes: Mapping[str, Sizes]) -> dict[str, Keep]:
  """{path of a stack: what to keep of it}."""
  first, *others = sizes
  parts = {first: keep}
  if others:
    parts['decoder'] = keep.decoder or Keep()
    if parts['decoder'].vocabulary is not None or parts['decoder'].decoder is not None:
      raise ValueError(
        'Keep.decoder has layers, heads, cross_heads and mlp alone: encoder and decoder share the '
        'words, which are those of Keep.vocabulary'
      )
  elif keep.decoder is not None:
    raise ValueError('Keep.decoder is for a T5; this model has one stack of blocks')
  return parts


def _blocks(part: Keep, sizes: Sizes, stack: str) -> list[_Block]:
  """The blocks that stay of a stack, in order."""
  depth = len(sizes.heads)
  layers = range(depth)
  if part.layers is not None:
    kept = _indices(f'layers of {stack!r}', part.layers, depth, 'layers')
    if kept is not None:
      layers = [int(number) for number in kept]
  if part.cross_heads and sizes.cross_heads is None:
    raise ValueError(f'cross_heads: the blocks of {stack!r} have no cross-attention')
  for name in ('heads', 'cross_heads', 'mlp'):
    for number in getattr(part, name):
      if number not in range(depth):
        raise ValueError(
          f'{name} of {stack!r}: there is no layer {number!r} among the {depth} layers, 0 to '
          f'{depth - 1}'
        )
      if number not in layers:
        raise ValueError(
          f'{name} of {stack!r}: layer {number} is not among those that stay, {part.layers}'
        )

  blocks = []
  for number in layers:
    label = f'of layer {number} of {stack!r}'
    counts = [sizes.heads[number]]
    heads = [_chosen(f'heads {label}', part.heads, number, counts[0], 'heads')]
    if sizes.cross_heads is not None:
      counts.append(sizes.cross_heads[number])
      heads.append(_chosen(f'cross_heads {label}', part.cross_heads, number, counts[1], 'heads'))
    units = _chosen(f'mlp {label}', part.mlp, number, sizes.mlp_dim[number], 'hidden units')
    blocks.append(_Block(number, tuple(heads), tuple(counts), units))
  return blocks


def _chosen(label: str, chosen: Mapping, number: int, count: int, what: str) -> Indices:
  if number not in chosen:
    return None
  return _indices(label, chosen[number], count, what)


def _indices(label: str, chosen: Sequence[int], count: int, what: str) -> Indices:
  """Chosen numbers as an array; None if they are all.

  Raises:
    ValueError: they are no numbers, do not ascend, are not among the `count`, or are none.
  """
  numbers = np.asarray(chosen)
  if numbers.ndim != 1 or not len(numbers):
    raise ValueError(f'{label}: give numbers of the {what} that stay, at least one; got {chosen}')
  if numbers.dtype == bool:
    raise ValueError(f'{label}: give numbers, np.flatnonzero(mask), in place of a mask')
  if not np.issubdtype(numbers.dtype, np.integer):
    raise ValueError(f'{label}: give whole numbers; got {chosen}')
  for number in numbers:
    if not 0 <= number < count:
      raise ValueError(f'{label}: {number} is not among the {count} {what}, 0 to {count - 1}')
  if (np.diff(numbers) <= 0).any():
    raise ValueError(f'{label}: numbers must ascend, each once; got {chosen}')
  if len(numbers) == count:
    return None
  return numbers


def _check_padding(model, vocabulary: Sequence[int]) -> None:
  """Raises a ValueError if the padding of a RoBERTa, from which it counts positions, is moved."""
  pad_id = getattr(model, 'pad_id', None)
  if pad_id is not None and list(vocabulary[: pad_id + 1]) != list(range(pad_id + 1)):
    raise ValueError(
      f'vocabulary: positions are counted from the padding {pad_id}, which must keep its number: '
      f'keep the words 0 to {pad_id}'
    )


def _bias_heads(whole: Sizes, block: _Block) -> np.ndarray:
  """The heads of the wide position bias that a block goes on reading."""
  heads = np.array(whole.bias_heads[block.number])
  if block.heads[0] is None:
    return heads
  return heads[block.heads[0]]


def _columns(whole: Sizes, blocks: list[_Block]) -> Indices:
  """The heads of the position bias that some block goes on reading, ascending; None for all."""
  if whole.bias_heads is None:
    return None
  columns = np.unique(np.concatenate([_bias_heads(whole, block) for block in blocks]))
  if len(columns) == 1 + max(max(heads) for heads in whole.bias_heads):
    return None
  return columns


def _narrow_sizes(whole: Sizes, blocks: list[_Block], columns: Indices) -> Sizes:
  """The sizes of the blocks that stay."""

  def count(indices: Indices, before: int) -> int:
    return before if indices is None else len(indices)

  heads = tuple(count(block.heads[0], block.counts[0]) for block in blocks)
  mlp_dim = tuple(count(block.mlp, whole.mlp_dim[block.number]) for block in blocks)
  cross_heads = None
  if whole.cross_heads is not None:
    cross_heads = tuple(count(block.heads[1], block.counts[1]) for block in blocks)
  bias_heads = None
  if whole.bias_heads is not None:
    rows = []
    for block in blocks:
      read = _bias_heads(whole, block)
      if columns is not None:
        read = np.searchsorted(columns, read)
      rows.append(tuple(int(head) for head in read))
    bias_heads = tuple(rows)
  return Sizes(heads, mlp_dim, cross_heads, bias_heads)


def _traced(family: Sized, model) -> tuple[Any, Sites]:
  """(the variables of a model as shapes, its sites)."""
  example = family.example(model)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *example)
  return shapes, sites_of(model, shapes, *example)


def _by_layer(family: Sized, sites: Sites) -> dict[tuple[str, int], tuple[str, int]]:
  """{(path of a stack, number of a layer): (path of its block, index there)}."""
  found = {}
  for path, site in sites.items():
    if _plays(family, 'block', path):
      stack = path.rpartition('/')[0]
      for index, number in enumerate(site.numbers):
        found[stack, number] = path, index
  return found


def _plays(family: Sized, role: str, path: str) -> bool:
  """Whether a module has a role in the family."""
  pattern = family.anatomy.roles.get(role)
  return pattern is not None and re.fullmatch(pattern, path) is not None


def _inside(sites: Sites, block: str) -> Iterator[str]:
  """The rest of the path of a block, and of each module in it: '', '/attention' and so on."""
  for path in sites:
    if path == block or path.startswith(f'{block}/'):
      yield path.removeprefix(block)


def _block_cut(
  family: Sized, sites: Sites, path: str, site: Site, block: _Block
) -> tuple[Indices, Indices]:
  """(inputs, outputs) that stay of a module of a block."""
  if _plays(family, 'fc1', site.path):
    return None, block.mlp
  if _plays(family, 'fc2', site.path):
    return block.mlp, None
  reads_heads = _plays(family, 'o', site.path)
  if not reads_heads and not any(_plays(family, role, site.path) for role in ('q', 'k', 'v')):
    return None, None
  attentions = [path + rest for rest in _inside(sites, path)]
  attentions = [path for path in attentions if _plays(family, 'attention', path)]
  which = attentions.index(site.path.rpartition('/')[0])
  heads = block.heads[which]
  if heads is None:
    return None, None
  # The columns of a projection are those of its heads one after the other; of grouped queries the
  # group of each key head.
  _, leaf = kernel_of(site)
  if reads_heads:
    return spans(heads, block.counts[which], leaf.fan_in), None
  return None, spans(heads, block.counts[which], leaf.fan_out)


def _source_outside(
  family: Sized, site: Site, words: Indices, columns: Mapping[str, Indices]
) -> _Source:
  """Where a module outside of blocks comes from: the wide module of the same path."""
  if _plays(family, 'position_bias', site.path):
    return _Source(site, outs=columns[site.path.rpartition('/')[0]])
  if site.path in family.words:
    # The head has a column for each word, the table of words a row.
    if site.matrices:
      return _Source(site, outs=words)
    return _Source(site, ins=words)
  return _Source(site)


def _cut(source: _Source, site: Site, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The arrays of one layer of a narrow site, by name."""
  own = {}
  for name in source.site.leaves:
    own[name] = source.site.take(arrays[join_path(source.site.path, name)], source.layer)
  if source.ins is None and source.outs is None:
    return own
  shapes = {name: leaf.shape for name, leaf in site.leaves.items()}
  return cut_map(source.site, own, shapes, source.ins, source.outs)


def _stacked(site: Site, layers: list[jax.Array]) -> jax.Array:
  """An array as a site stores it, of those of its layers."""
  if not site.axes:
    return layers[0]
  return site.stack_restore(jnp.stack(layers).reshape(*site.lengths, *layers[0].shape))


# Thetas.


def narrowed_theta(model, keep: Keep, theta: Any, like: Any) -> Any:
  """A theta of a wide model, cut for the narrow one.

  An axis of an entry is cut if it is as long as the inputs, or the outputs, of the linear map it
  adapts: of LoRA the rows of `a`, or the columns of `b`.

  Args:
    model: the wide model.
    keep: what the narrow model keeps of it.
    theta: of a method on the wide model.
    like: theta of the same method on the narrow one, or its shapes (`Tuned.shapes`).

  Raises:
    ValueError: an entry whose axes are not those of a linear map, or that numbers what is cut.
  """
  family = _family_of(model)
  plan = _plan(family, model, keep)
  result = {}
  for name, path, entries, sources in _entries(plan, like):
    site = plan.narrow[path]
    new = {}
    for key, spec in entries.items():
      layers = []
      for source in sources:
        x = _layer(source.site, _entry(theta, name, source.site.path, key), source.layer)
        narrow_shape = _layer_shape(site, spec)
        where = _places(source, site, x.shape, narrow_shape, x.dtype, f'{name}/{path}/{key}')
        layers.append(x[where])
      new[key] = _stacked_theta(site, layers)
    result.setdefault(name, {})[path] = _rebuilt(like[name][path], new)
  return result


def widened_theta(model, keep: Keep, theta: Any, into: Any) -> Any:
  """A theta of a narrow model, put into one of the wide model ("recovery", arXiv 2502.13533).

  Args:
    model: the wide model.
    keep: what the narrow model keeps of it.
    theta: of a method on the narrow model.
    into: theta of the same method on the wide model. Its numbers stay in the cut places: zeros,
      `jax.tree.map(jnp.zeros_like, tuned.init(...))`, leave the kernels of LoRA as they are there.

  Raises:
    ValueError: as `narrowed_theta`.
  """
  family = _family_of(model)
  plan = _plan(family, model, keep)
  result = jax.tree.map(lambda x: x, into)  # dicts of its own
  for name, path, entries, sources in _entries(plan, theta):
    site = plan.narrow[path]
    for index, source in enumerate(sources):
      wide = leaf_paths(_at(result, name, source.site.path))
      for key, entry in entries.items():
        old = _entry(result, name, source.site.path, key)
        x = _layer(site, entry, index)
        whole = _layer(source.site, old, source.layer)
        where = _places(source, site, whole.shape, x.shape, x.dtype, f'{name}/{path}/{key}')
        layer = whole.at[where].set(x)
        if source.site.axes:
          layers = old.reshape(source.site.layers, *whole.shape)
          layer = layers.at[source.layer].set(layer).reshape(old.shape)
        wide[key] = layer
      result[name][source.site.path] = _rebuilt(result[name][source.site.path], wide)
  return result


def _entries(plan: _Plan, theta: Any) -> Iterator[tuple[str, str, dict[str, Any], list[_Source]]]:
  """(method, path of a narrow site, {path of an entry: array}, sources) of a theta."""
  for name, by_path in theta.items():
    for path, t in by_path.items():
      if path not in plan.sources:
        hint = did_you_mean(path, plan.sources)
        raise ValueError(f'theta[{name!r}] has {path!r}, which the narrow model has not{hint}')
      yield name, path, leaf_paths(t), plan.sources[path]


def _at(theta: Any, name: str, path: str) -> Any:
  if path not in theta.get(name, {}):
    raise ValueError(
      f'the theta of the wide model has no entry {name!r} for {path!r}: are both of one method?'
    )
  return theta[name][path]


def _entry(theta: Any, name: str, path: str, key: str) -> jax.Array:
  """The entry of a theta at a site of the wide model."""
  entries = leaf_paths(_at(theta, name, path))
  if key not in entries:
    raise ValueError(
      f'the theta of the wide model has no {key!r} at {path!r}: are both of one method?'
    )
  return entries[key]


def _layer(site: Site, x: jax.Array, index: int) -> jax.Array:
  """One layer of an entry of theta, whose first axes are those of the stack."""
  if not site.axes:
    return x
  _layer_shape(site, x)
  return x.reshape(site.layers, *x.shape[len(site.axes) :])[index]


def _layer_shape(site: Site, x: Any) -> tuple[int, ...]:
  """The shape of an entry of theta in one layer.

  Raises:
    ValueError: it has not all layers.
  """
  if x.shape[: len(site.axes)] != site.lengths:
    raise ValueError(
      f'theta at {site.path!r} has the shape {x.shape}, and does not begin with all {site.layers} '
      'layers: one for some layers (`layers=`) is not cut'
    )
  return x.shape[len(site.axes) :]


def _stacked_theta(site: Site, layers: list[jax.Array]) -> jax.Array:
  if not site.axes:
    return layers[0]
  return jnp.stack(layers).reshape(*site.lengths, *layers[0].shape)


def _places(
  source: _Source, narrow: Site, wide_shape: tuple, shape: tuple, dtype: Any, label: str
) -> tuple:
  """The index of a narrow entry in the wide one.

  Raises:
    ValueError: nothing says which numbers of it stay.
  """
  is_cut = source.ins is not None or source.outs is not None
  if is_cut and not jnp.issubdtype(dtype, jnp.inexact):
    raise ValueError(
      f'theta has {label!r}, which numbers parts of a matrix that is cut: other numbers mean them '
      'in the narrow model'
    )
  if wide_shape == shape:
    return (...,)
  kept = None
  sizes = (0, 0)
  if is_cut:
    _, leaf = kernel_of(source.site)
    if source.ins is not None:
      kept, sizes = source.ins, (leaf.fan_in, len(source.ins))
    else:
      kept, sizes = source.outs, (leaf.fan_out, len(source.outs))
  axes = []
  fits = len(wide_shape) == len(shape)
  for before, after in zip(wide_shape, shape, strict=False):
    if before == after:
      axes.append(np.arange(before))
    else:
      fits = fits and (before, after) == sizes
      axes.append(kept)
  if not fits:
    raise ValueError(
      f'theta has {label!r} of shape {wide_shape} in the wide model and {shape} in the narrow one, '
      f'and no linear map at {narrow.path!r} is cut so: only entries of linear maps are cut'
    )
  return np.ix_(*axes)


def _rebuilt(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """A tree with other leaves, by their paths."""
  paths = list(leaf_paths(tree))
  return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in paths])
