"""Which tensor of a Hugging Face file is which parameter of ours, for all families.

A table has rows (path of our module, kind, key on disk). A path has `block` for the blocks of a
stack, its key `{i}` for their number, whether our stack is unrolled or scanned, and `{e}` for the
number of an expert. The same rows serve for loading and for saving. Rows of one key are parts of
one tensor, one behind the other.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange


def _same(x):
  return x


class Leaf(NamedTuple):
  """How one array of a module is stored on disk.

  Attributes:
    suffix: of its key, behind the key of the module.
    ours: array on disk -> our array.
    theirs: our array -> array on disk.
    outputs: the axis on disk along which the outputs of several layers lie in one tensor.
  """

  suffix: str
  ours: Callable[[np.ndarray], np.ndarray] = _same
  theirs: Callable[[np.ndarray], np.ndarray] = _same
  outputs: int = 0


# Dense kernels are [outputs, inputs] on disk and [inputs, outputs] here. Convolutions are [outputs,
# inputs, height, width] on disk and [height, width, inputs, outputs] here.
KINDS: dict[str, dict[str, Leaf]] = {
  'param': {'': Leaf('')},
  # One token, [1, D] here.
  'token': {'': Leaf('', lambda x: x.reshape(1, -1), lambda x: x.reshape(1, 1, -1))},
  # One vector on disk, [1, 1, D] here; a table [N, D] on disk, [1, N, D] here.
  'vector': {'': Leaf('', lambda x: x.reshape(1, 1, -1), lambda x: x.reshape(-1))},
  'positions': {'': Leaf('.weight', lambda x: x[None], lambda x: x[0])},
  # Numbers of channels, [1, 1, 1, D] on disk.
  'channels': {
    name: Leaf(suffix, lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, 1, -1))
    for name, suffix in (('scale', '.weight'), ('bias', '.bias'))
  },
  # Query, key and value of torch.nn.MultiheadAttention in one layer.
  'in_proj': {'kernel': Leaf('_weight', np.transpose, np.transpose), 'bias': Leaf('_bias')},
  'dense': {'kernel': Leaf('.weight', np.transpose, np.transpose), 'bias': Leaf('.bias')},
  # Dense of GPT-2, which is on disk as it is here.
  'conv1d': {'kernel': Leaf('.weight', outputs=1), 'bias': Leaf('.bias')},
  'conv': {
    'kernel': Leaf(
      '.weight',
      lambda x: rearrange(x, 'o i h w -> h w i o'),
      lambda x: rearrange(x, 'h w i o -> o i h w'),
    ),
    'bias': Leaf('.bias'),
  },
  'norm': {'scale': Leaf('.weight'), 'bias': Leaf('.bias')},
  'embed': {'embedding': Leaf('.weight')},
}


class Table(NamedTuple):
  """The rows of a family.

  Attributes:
    base: prefix of the keys when the file also holds a head; a bare model's file lacks it.
    rows: (path, kind, key) of the base model; the prefix is not written.
    head: the same for the modules outside the base model; their keys have no prefix.
    ignore: patterns of keys (without prefix) that a file may have although the model does not read
      them.
    architectures: the names in transformers of the bare model and of the one with a head.
    tied: whether the head is an array of the base model; the keys of a file then have the prefix
      although no head is stored.
    prefixed: whether the keys of a file have the prefix also where it holds no head.
    other_bases: prefixes that files of this family have in place of `base` where they have another
      head than the model.
    fresh: modules that a new head makes fresh where files lack them.
    renamed: (piece of a key, what transformers from 5 on calls it in memory), in the order in which
      they are put in place; files keep the keys.
  """

  base: str
  rows: tuple[tuple[str, str, str], ...]
  head: tuple[tuple[str, str, str], ...]
  ignore: tuple[str, ...]
  architectures: tuple[str, str]
  tied: bool = False
  prefixed: bool = False
  other_bases: tuple[str, ...] = ()
  fresh: tuple[str, ...] = ('pooler',)
  renamed: tuple[tuple[str, str], ...] = ()

  def in_memory(self, key: str) -> str:
    """What transformers from 5 on calls an array in memory that has this key in files."""
    for old, new in self.renamed:
      key = key.replace(old, new)
    return key

  def leaves(self) -> dict[str, tuple[str, Leaf, bool]]:
    """{path of an array: (key, how it is stored, whether it belongs to the head)}."""
    found = {}
    for head, rows in ((False, self.rows), (True, self.head)):
      for path, kind, key in rows:
        for name, leaf in KINDS[kind].items():
          found[f'{path}/{name}'.rstrip('/')] = (key + leaf.suffix, leaf, head)
    return found

  def block_keys(self) -> list[str]:
    """Patterns of the keys inside blocks; their first group is the block's number."""
    starts = {key.split('{i}')[0] for _, _, key in self.rows if '{i}' in key}
    return [re.escape(start) + r'(\d+)\.' for start in sorted(starts)]

  def bare(self, name: str) -> str:
    """The key of a tensor without its prefix."""
    for base in (self.base, *self.other_bases):
      name = name.removeprefix(base)
    return name

  def known(self, key: str) -> bool:
    """Whether a key without prefix may be left unread."""
    return any(re.fullmatch(pattern, key) for pattern in self.ignore)


class Part(NamedTuple):
  """Where an array lies in a tensor on disk that has others too.

  Attributes:
    axis: of the tensor, along which they lie.
    start, stop: of this array.
    size: of the tensor along the axis.
  """

  axis: int
  start: int
  stop: int
  size: int

  @property
  def index(self) -> tuple[slice, ...]:
    """Of the tensor: where the array is."""
    return (*(slice(None),) * self.axis, slice(self.start, self.stop))

  def of(self, tensor: np.ndarray) -> np.ndarray:
    """The array of a tensor."""
    return tensor[self.index]

  def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor, of that of the array on disk."""
    return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])


class Place(NamedTuple):
  """Where one of our arrays is stored on disk.

  Attributes:
    path: of our array.
    shape: of what one key has of it.
    keys: one key, or one per layer of a scanned stack; of experts one each, layer by layer.
    leaf: how what a key has is stored.
    head: whether the array belongs to the head, so that its keys have no prefix.
    stacked: whether our array is a stack of layers.
    part: where in a tensor that it shares with others; None where it has one of its own.
    experts: how many a layer has that have a key each, the first axis of a layer; None for none.
  """

  path: str
  shape: tuple[int, ...]
  keys: tuple[str, ...]
  leaf: Leaf
  head: bool
  stacked: bool
  part: Part | None = None
  experts: int | None = None

  @property
  def shape_on_disk(self) -> tuple[int, ...]:
    """The shape of what `leaf.theirs` makes of what one key has."""
    # No data is allocated: broadcasting a scalar gives an array of stride zero.
    return self.leaf.theirs(np.broadcast_to(np.float32(0), self.shape)).shape


def places(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
  """Finds the place of each of our arrays.

  Args:
    table: of the family.
    shapes: {path: shape} of our arrays; all of a tensor that several share.

  Returns:
    Places in the order of shapes, keys without prefix.

  Raises:
    ValueError: a path that the table does not know, or some arrays of a tensor without the others.
  """
  leaves = table.leaves()
  order = {path: number for number, path in enumerate(leaves)}
  sharers = Counter((key, head) for key, _, head in leaves.values())
  found = []
  shared: dict[Any, list[tuple[int, Place]]] = {}
  for path, shape in shapes.items():
    generic = re.sub(r'(^|/)(?:block_\d+|blocks)(?=/)', r'\1block', path)
    if generic not in leaves:
      raise ValueError(
        f'the parameter {path!r} has no place in the files of {table.architectures[0]}'
      )
    key, leaf, head = leaves[generic]
    block = re.search(r'(?:^|/)block_(\d+)/', path)
    stacked = re.search(r'(?:^|/)blocks/', path) is not None
    layers = range(1)
    if stacked:
      layers = range(shape[0])
      shape = shape[1:]
    elif block:
      layers = range(int(block[1]), int(block[1]) + 1)
    experts = None
    if '{e}' in key:
      experts, *shape = shape
    keys = tuple(key.format(i=i, e=e) for i in layers for e in range(experts or 1))
    place = Place(path, tuple(shape), keys, leaf, head, stacked, experts=experts)
    found.append(place)
    if sharers[key, head] > 1:
      shared.setdefault((key, head, keys), []).append((order[generic], place))
  parts = {}
  for (key, head, _), members in shared.items():
    together = [place for _, place in sorted(members, key=lambda member: member[0])]
    if len(together) != sharers[key, head]:
      raise ValueError(
        f'{", ".join(place.path for place in together)}: {key!r} has {sharers[key, head]} arrays, '
        'and can be read or written with all of them alone'
      )
    parts |= _parts(together)
  return [place._replace(part=parts.get(place.path)) for place in found]


def _parts(members: list[Place]) -> dict[str, Part]:
  """{path: its part} of the arrays of one tensor, in the order in which they lie there."""
  axis = members[0].leaf.outputs
  sizes = [place.shape_on_disk[axis] for place in members]
  ends = list(itertools.accumulate(sizes))
  return {
    place.path: Part(axis, end - size, end, ends[-1])
    for place, size, end in zip(members, sizes, ends, strict=True)
  }
