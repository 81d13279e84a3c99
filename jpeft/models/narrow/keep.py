"""What a narrow model keeps, as its user says it and as numbers that are checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jpeft.cutting import Indices

from ..sizes import Sizes


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


class Block(NamedTuple):
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


def kept_blocks(keep: Keep, sizes: Mapping[str, Sizes]) -> dict[str, list[Block]]:
  """{path of a stack: the blocks that stay, in order}.

  Args:
    keep: as the user says it.
    sizes: {path of a stack: sizes of its blocks} of the wide model.

  Raises:
    ValueError: it keeps nothing, or what is not there.
  """
  kept = {}
  for stack, part in _parts(keep, sizes).items():
    kept[stack] = _blocks(part, sizes[stack], stack)
  return kept


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


def _blocks(part: Keep, sizes: Sizes, stack: str) -> list[Block]:
  """The blocks that stay of a stack, in order."""
  depth = len(sizes.heads)
  layers = list(range(depth))
  if part.layers is not None:
    layers = checked(f'layers of {stack!r}', part.layers, depth, 'layers').tolist()
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
    blocks.append(Block(number, tuple(heads), tuple(counts), units))
  return blocks


def _chosen(label: str, chosen: Mapping, number: int, count: int, what: str) -> Indices:
  """What stays of a layer; None for all."""
  if number not in chosen:
    return None
  return unless_all(checked(label, chosen[number], count, what), count)


def unless_all(numbers: np.ndarray, count: int) -> Indices:
  """Checked numbers; None if they are all of `count`."""
  return None if len(numbers) == count else numbers


def checked(label: str, chosen: Sequence[int], count: int, what: str) -> np.ndarray:
  """Chosen numbers as an array.

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
  return numbers
