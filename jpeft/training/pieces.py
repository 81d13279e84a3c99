"""A checkpoint whose arrays are written in pieces, each by a process that holds it.

A folder of pieces has one file a process, N.bin: the parts of arrays that lie on its devices, one
after the other. `about.json` says what lies where, and has the SHA-256 of each file. It is written
when all files are on the disk, and then the folder gets its name.
"""

import hashlib
import itertools
import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jpeft import jsonfiles, textfiles, writing

ABOUT = 'about.json'
_LISTED = {'file': str, 'sha256': str, 'parts': list}
# For each axis of an array (first entry, end).
Bounds = tuple[tuple[int, int], ...]


def bytes_of(leaf) -> np.ndarray:
  """The bytes of an array, in one row."""
  return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def are_cut(leaves: Iterable[jax.Array]) -> bool:
  """Whether this process holds only a part of some array."""
  return any(not x.is_fully_addressable and not x.is_fully_replicated for x in leaves)


def begun(folder: pathlib.Path, step: int) -> pathlib.Path:
  """Where a checkpoint is written before it gets its name; such a place is cleared or made."""
  part = _part(folder, step)
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  return part


def write(folder: pathlib.Path, step: int, number: int, leaves: Sequence[jax.Array]) -> None:
  """Writes what this process holds, to where `begun` has made room; waits for no other.

  Args:
    folder: of the checkpoints.
    step: of this one.
    number: of the process.
    leaves: arrays on the devices of all processes. Of parts that several devices hold, one writes.
  """
  part = _part(folder, step)
  digest = hashlib.sha256()
  parts = []
  file = part / f'{number}.bin'
  with file.open('wb') as out:
    for leaf, x in enumerate(leaves):
      for shard in x.addressable_shards:
        if shard.replica_id == 0:
          data = bytes_of(shard.data)
          out.write(data)
          digest.update(data)
          parts.append([leaf, _bounds(shard.index, x.shape)])
  writing.sync(file)
  found = {'file': file.name, 'sha256': digest.hexdigest(), 'parts': parts}
  writing.write(file.with_suffix('.json'), json.dumps(found))


def finished(folder: pathlib.Path, step: int, about: dict, count: int) -> None:
  """Gives a checkpoint its name, when `count` processes have written their pieces.

  Raises:
    ValueError: the pieces of a process are not there.
  """
  part = _part(folder, step)
  found = []
  for number in range(count):
    listed = part / f'{number}.json'
    if not listed.exists():
      raise ValueError(f'what process {number} has written of a checkpoint is not in {part}')
    found.append(jsonfiles.read(listed))
    listed.unlink()
  writing.write(part / ABOUT, json.dumps(about | {'pieces': found}))
  writing.sync_tree(part)
  part.rename(folder / str(step))
  writing.sync(folder)


def _part(folder: pathlib.Path, step: int) -> pathlib.Path:
  return folder / f'{step}.tmp'


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
  """The part of an array that slices name."""
  return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def about_of(place: pathlib.Path) -> dict | None:
  """What is stored beside the arrays of a checkpoint in pieces; None if it is none."""
  if not (place / ABOUT).exists():
    return None
  return jsonfiles.read(place / ABOUT, {'leaves': list, 'pieces': [_LISTED]})


class Pieces:
  """The arrays of a checkpoint in pieces."""

  def __init__(self, place: pathlib.Path, about: dict, like: Sequence[Any]):
    """Args: place, the folder of the checkpoint; about, of it; like, its arrays or their shapes."""
    self._place = place
    self._like = like
    self._files = about['pieces']
    # {number of an array: [(bounds, its file, where it begins there)]}
    self._parts: dict[int, list[tuple[Bounds, pathlib.Path, int]]] = {}
    for listed in self._files:
      file = place / listed['file']
      begin = 0
      for number, bounds in listed['parts']:
        bounds = tuple(map(tuple, bounds))
        self._parts.setdefault(number, []).append((bounds, file, begin))
        begin += _size(bounds) * like[number].dtype.itemsize

  def check(self) -> None:
    """Raises a ValueError if a file is not what was written."""
    for listed in self._files:
      path = self._place / listed['file']
      if path.parent != self._place:
        raise ValueError('it is not what was written')
      textfiles.check_regular(path)
      with path.open('rb') as file:
        if hashlib.file_digest(file, 'sha256').hexdigest() != listed['sha256']:
          raise ValueError('it is not what was written')

  def region(self, number: int, index: Sequence[slice]) -> np.ndarray:
    """A part of an array, from the pieces that hold some of it."""
    like = self._like[number]
    wanted = _bounds(index, like.shape)
    found = np.empty([end - begin for begin, end in wanted], like.dtype)
    filled = 0
    for bounds, file, begin in self._parts.get(number, ()):
      common = _common(bounds, wanted)
      if common is None:
        continue
      shape = [end - first for first, end in bounds]
      stored = np.memmap(file, np.uint8, 'r', begin, (_size(bounds) * like.dtype.itemsize,))
      stored = stored.view(like.dtype).reshape(shape)
      found[_slices(common, wanted)] = stored[_slices(common, bounds)]
      filled += _size(common)
    if filled != found.size:
      raise ValueError('it is not what was written')
    return found

  def whole(self) -> list[np.ndarray]:
    """The arrays."""
    full = [tuple(itertools.repeat(slice(None), len(x.shape))) for x in self._like]
    return [self.region(number, index) for number, index in enumerate(full)]

  def placed(self) -> list[jax.Array]:
    """The arrays on their devices; this process reads what its own need."""
    found = []
    for number, x in enumerate(self._like):

      def part(index, number=number):
        return self.region(number, index)

      found.append(jax.make_array_from_callback(x.shape, x.sharding, part))
    return found


def _size(bounds: Bounds) -> int:
  return math.prod(end - begin for begin, end in bounds)


def _common(one: Bounds, other: Bounds) -> Bounds | None:
  """What two parts of an array have in common; None for nothing."""
  found = []
  for (begin, end), (other_begin, other_end) in zip(one, other, strict=True):
    found.append((max(begin, other_begin), min(end, other_end)))
  if any(begin >= end for begin, end in found):
    return None
  return tuple(found)


def _slices(part: Bounds, of: Bounds) -> tuple[slice, ...]:
  """Where a part of an array is within another part, which holds it."""
  pairs = zip(part, of, strict=True)
  return tuple(slice(begin - first, end - first) for (begin, end), (first, _) in pairs)
