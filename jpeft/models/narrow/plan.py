"""Which module of the wide model each module of a narrow one is cut out of, and where."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core import Site, Sites, sites_of
from jpeft.cutting import Indices, kernel_of, spans

from ..bert import BERT_SIZES
from ..gpt import GPT_SIZES
from ..llama import LLAMA_SIZES
from ..sizes import Sized, Sizes
from ..t5 import T5_SIZES
from ..vit import VIT_SIZES
from .keep import Block, Keep, checked, kept_blocks, unless_all

_FAMILIES: tuple[Sized, ...] = (VIT_SIZES, BERT_SIZES, T5_SIZES, LLAMA_SIZES, GPT_SIZES)


class Source(NamedTuple):
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


class Plan(NamedTuple):
  """A narrow model, and where its modules come from.

  Attributes:
    model: the narrow model.
    shapes: its variables, as shapes.
    wide: sites of the wide model.
    narrow: sites of the narrow one.
    sources: {path of a narrow site: the source of each layer of its stack}.
  """

  model: Any
  shapes: Any
  wide: Sites
  narrow: Sites
  sources: dict[str, list[Source]]


def plan_of(model, keep: Keep) -> Plan:
  """The plan of a narrow model.

  Raises:
    TypeError: a model whose sizes jpeft does not know.
    ValueError: what is kept is not in the model.
  """
  family = family_of(model)
  wide_sizes = family.sizes(model)
  blocks = kept_blocks(keep, wide_sizes)
  words = _words(family, model, keep)
  columns = {stack: _columns(whole, blocks[stack]) for stack, whole in wide_sizes.items()}
  sizes = {}
  for stack, whole in wide_sizes.items():
    sizes[stack] = _narrow_sizes(whole, blocks[stack], columns[stack])
  narrow_model = family.resized(model, sizes, None if words is None else len(words))
  narrow_model = narrow_model.clone(scan=model.scan and all(s.alike for s in sizes.values()))
  _, wide = _traced(family, model)
  shapes, narrow = _traced(family, narrow_model)

  wide_blocks = layers_of_blocks(family, wide)
  sources: dict[str, list[Source]] = {path: [] for path in narrow}
  for (stack, number), (path, _) in layers_of_blocks(family, narrow).items():
    block = blocks[stack][number]
    wide_path, layer = wide_blocks[stack, block.number]
    for local in _inside(narrow, path):
      site = wide[wide_path + local]
      ins, outs = _block_cut(family, wide, wide_path, site, block)
      sources[path + local].append(Source(site, layer, ins, outs))
  for path, found in sources.items():
    if not found:
      found.append(_source_outside(family, model, wide[path], words, columns))
  return Plan(narrow_model, shapes, wide, narrow, sources)


def family_of(model) -> Sized:
  """The family of a model whose sizes jpeft knows; raises a TypeError for another one."""
  for family in _FAMILIES:
    if isinstance(model, family.kind):
      return family
  known = ', '.join(family.kind.__name__ for family in _FAMILIES)
  raise TypeError(
    f'narrow models are made of {known}, whose sizes jpeft knows; got {type(model).__name__}'
  )


def _words(family: Sized, model, keep: Keep) -> Indices:
  """The words that stay; None for all.

  Raises:
    ValueError: the model has no such words; or the padding of a RoBERTa, from which it counts
      positions, gets another number.
  """
  if keep.vocabulary is None:
    return None
  if not family.words(model):
    raise ValueError(f'vocabulary: a {family.kind.__name__} reads no words')
  words = checked('vocabulary', keep.vocabulary, model.vocab, 'words')
  pad_id = getattr(model, 'pad_id', None)
  if pad_id is not None and words[: pad_id + 1].tolist() != list(range(pad_id + 1)):
    raise ValueError(
      f'vocabulary: positions are counted from the padding, {pad_id}, which must keep its number: '
      f'keep the words 0 to {pad_id}'
    )
  return unless_all(words, model.vocab)


def _bias_heads(whole: Sizes, block: Block) -> np.ndarray:
  """The heads of the wide position bias that a block goes on reading."""
  heads = np.array(whole.bias_heads[block.number])
  if block.heads[0] is None:
    return heads
  return heads[block.heads[0]]


def _columns(whole: Sizes, blocks: list[Block]) -> Indices:
  """The heads of the position bias that some block goes on reading, ascending; None for all."""
  if whole.bias_heads is None:
    return None
  columns = np.unique(np.concatenate([_bias_heads(whole, block) for block in blocks]))
  if len(columns) == 1 + max(max(heads) for heads in whole.bias_heads):
    return None
  return columns


def _narrow_sizes(whole: Sizes, blocks: list[Block], columns: Indices) -> Sizes:
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


def layers_of_blocks(family: Sized, sites: Sites) -> dict[tuple[str, int], tuple[str, int]]:
  """{(path of a stack, number of a layer): (path of its block, index there)}."""
  found = {}
  for path, site in sites.items():
    if plays(family, 'block', path):
      stack = path.rpartition('/')[0]
      for index, number in enumerate(site.numbers):
        found[stack, number] = path, index
  return found


def plays(family: Sized, role: str, path: str) -> bool:
  """Whether a module has a role in the family."""
  pattern = family.anatomy.roles.get(role)
  return pattern is not None and re.fullmatch(pattern, path) is not None


def _inside(sites: Sites, block: str) -> Iterator[str]:
  """The rest of the path of a block, and of each module in it: '', '/attention' and so on."""
  for path in sites:
    if path == block or path.startswith(f'{block}/'):
      yield path.removeprefix(block)


def _block_cut(
  family: Sized, sites: Sites, path: str, site: Site, block: Block
) -> tuple[Indices, Indices]:
  """(inputs, outputs) that stay of a module of a block."""
  if plays(family, 'fc1', site.path):
    return None, block.mlp
  if plays(family, 'fc2', site.path):
    return block.mlp, None
  if plays(family, 'position_bias', site.path):  # of the block's own, a column for each head
    return None, block.heads[0]
  reads_heads = plays(family, 'o', site.path)
  if not reads_heads and not any(plays(family, role, site.path) for role in ('q', 'k', 'v')):
    return None, None
  attentions = [path + rest for rest in _inside(sites, path)]
  attentions = [path for path in attentions if plays(family, 'attention', path)]
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
  family: Sized, model, site: Site, words: Indices, columns: Mapping[str, Indices]
) -> Source:
  """Where a module outside of blocks comes from: the wide module of the same path."""
  if plays(family, 'position_bias', site.path):
    return Source(site, outs=columns.get(site.path.rpartition('/')[0]))
  if site.path in family.words(model):
    # The head has a column for each word (and may be a bias alone), the table of words a row.
    if any(leaf.use == 'gather' for leaf in site.leaves.values()):
      return Source(site, ins=words)
    return Source(site, outs=words)
  return Source(site)
