"""Between our parameter trees and the tensors of Hugging Face files, by a family's table."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.messages import nearest

from .layout import Place, Table, places
from .safetensors import Checkpoint

_SHOWN = 8  # problems named in one error


def from_files(
  checkpoint: Checkpoint,
  table: Table,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  edits: Mapping[str, Callable[[np.ndarray], np.ndarray]],
  fresh: set[str],
  layers: int | None,
  param_dtype: Any,
  coded: Mapping[str, Callable[[Iterable[np.ndarray]], Any]],
) -> dict[str, Any]:
  """Reads our arrays from a folder.

  Args:
    checkpoint: the folder.
    table: of the family.
    shapes: {path: shape} of the arrays that the model wants.
    edits: {path: function} on what was read, before its shape is compared.
    fresh: paths that are not read.
    layers: blocks from this number on are not missed by the model.
    param_dtype: number format of the result.
    coded: {path: function} of the layers of an array, read one at a time, to what stands for it.

  Returns:
    {path: array} for all of shapes but the fresh.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape; one error names them.
  """
  names = _names(checkpoint, table)
  wanted = [place for place in places(table, shapes) if place.path not in fresh]
  problems = [
    problem for place in wanted for problem in _unfit(place, names, checkpoint, place.path in edits)
  ]
  read = {key for place in wanted for key in place.keys}
  problems += [
    f'unexpected {name!r} of shape {_shape(checkpoint, name)}{_near(key, read, names)}'
    for key, name in names.items()
    if key not in read and not _spare(key, table, layers)
  ]
  if problems:
    rest = [f'... and {len(problems) - _SHOWN} more'] if len(problems) > _SHOWN else []
    raise ValueError(
      f'{checkpoint.folder} does not fit {table.architectures[0]}:\n  '
      + '\n  '.join(problems[:_SHOWN] + rest)
    )

  def load(place: Place):
    edit = edits.get(place.path, lambda x: x)
    arrays = (edit(place.leaf.ours(checkpoint.read(names[key]))) for key in place.keys)
    if place.path in coded:
      return coded[place.path](arrays)
    return jnp.asarray(np.stack(list(arrays)) if place.stacked else next(arrays), param_dtype)

  return {place.path: load(place) for place in wanted}


def to_tensors(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
  """{key on disk: array} of our arrays {path: array}; scanned stacks are taken apart."""
  tensors = {}
  for place, keys in keyed(table, {path: tuple(np.shape(x)) for path, x in params.items()}):
    array = np.asarray(params[place.path])
    for key, one in zip(keys, array if place.stacked else [array], strict=True):
      tensors[key] = place.leaf.theirs(one)
  return tensors


def keyed(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[Place, list[str]]]:
  """The place of each array of a whole model, and its keys on disk, with the prefix that a file
  with a head has.
  """
  found = list(places(table, shapes))
  prefix = table.base if table.tied or any(place.head for place in found) else ''
  return [(place, [key if place.head else prefix + key for key in place.keys]) for place in found]


def _names(checkpoint: Checkpoint, table: Table) -> dict[str, str]:
  """{key as the table writes it: key in the file}."""

  def plain(name):
    key = name.removeprefix(table.base)
    return re.sub(r'\.gamma$', '.weight', re.sub(r'\.beta$', '.bias', key))  # names of before 2019

  return {plain(name): name for name in checkpoint.shapes}


def _unfit(place: Place, names, checkpoint: Checkpoint, edited: bool) -> list[str]:
  problems = []
  for key in place.keys:
    if key not in names:
      problems.append(
        f'missing {key!r}, {list(_on_disk(place))} for {place.path}'
        + _near(key, names, names, checkpoint)
      )
    elif not edited and checkpoint.shapes[names[key]] != _on_disk(place):
      problems.append(
        f'{names[key]!r} has the shape {_shape(checkpoint, names[key])}, the model '
        f'needs {list(_on_disk(place))} for {place.path}'
      )
  return problems


def _on_disk(place: Place) -> tuple[int, ...]:
  # No data is allocated: broadcasting a scalar gives an array of stride zero.
  return place.leaf.theirs(np.broadcast_to(np.float32(0), place.shape)).shape


def _spare(key: str, table: Table, layers: int | None) -> bool:
  """Whether nobody misses a key that is not read."""
  if table.known(key):
    return True
  numbers = [match for pattern in table.block_keys() if (match := re.match(pattern, key))]
  return layers is not None and any(int(match.group(1)) >= layers for match in numbers)


def _near(key: str, among, names, checkpoint: Checkpoint | None = None) -> str:
  near = nearest(key, among)
  if near is None:
    return ''
  if checkpoint is None:
    return f'; the nearest that is needed: {near!r}'
  name = names[near]
  return f'; the nearest in the file: {name!r} of shape {_shape(checkpoint, name)}'


def _shape(checkpoint: Checkpoint, name: str) -> list[int]:
  return list(checkpoint.shapes[name])
