"""Between our parameter trees and the tensors of Hugging Face files, by a family's table."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.messages import nearest

from .layout import Place, Table, places
from .safetensors import Checkpoint

_SHOWN = 8  # number of problems that one error names


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
    checkpoint: the folder, or a GGUF file.
    table: of the family.
    shapes: {path: shape} of the model's arrays.
    edits: {path: function} that is applied to an array when it is read; the shape on disk is then
      not checked.
    fresh: paths that are not read.
    layers: number of blocks that the model has if it drops the later ones of the file; else None.
    param_dtype: number format of the result.
    coded: {path: function} from the layers of an array, read one at a time, to its 4-bit form.

  Returns:
    {path: array} for all of shapes but the fresh.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape; one error names them.
  """
  names = _names(checkpoint, table)
  wanted = [place for place in places(table, shapes) if place.path not in fresh]
  problems = []
  for place in wanted:
    problems += _unfit(place, names, checkpoint, edited=place.path in edits)
  problems += _unexpected(wanted, names, checkpoint, table, layers)
  if problems:
    lines = problems[:_SHOWN]
    if len(problems) > _SHOWN:
      lines.append(f'... and {len(problems) - _SHOWN} more')
    raise ValueError(
      f'{checkpoint.folder} does not fit {table.architectures[0]}:\n  ' + '\n  '.join(lines)
    )

  def layer(place: Place, key: str) -> np.ndarray:
    array = place.leaf.ours(checkpoint.read(names[key], place.part))
    if place.path in edits:
      array = edits[place.path](array)
    return array

  params = {}
  for place in wanted:
    # One layer is read at a time, and none is given a name: it would stay while the next is read.
    arrays = map(functools.partial(layer, place), place.keys)
    if place.experts is not None:
      arrays = _stacks(arrays, place.experts)
    if place.path in coded:
      params[place.path] = coded[place.path](arrays)
    elif place.stacked:
      params[place.path] = jnp.asarray(np.stack(list(arrays)), param_dtype)
    else:
      params[place.path] = jnp.asarray(next(arrays), param_dtype)
  return params


def to_tensors(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
  """{key on disk: array} of our arrays {path: array}; the layers of scanned stacks are split."""
  shapes = {path: tuple(np.shape(array)) for path, array in params.items()}
  tensors: dict[str, np.ndarray] = {}
  for place, keys in keyed(table, shapes):
    array = np.asarray(params[place.path])
    layers = array if place.stacked else [array]
    if place.experts is not None:
      layers = [expert for layer in layers for expert in layer]
    for key, layer in zip(keys, layers, strict=True):
      theirs = place.leaf.theirs(layer)
      if place.part is None:
        tensors[key] = theirs
        continue
      if key not in tensors:
        tensors[key] = np.empty(place.part.whole(theirs.shape), theirs.dtype)
      place.part.of(tensors[key])[...] = theirs
  return tensors


def _stacks(arrays: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
  """Stacks of so many arrays each; no more than one stack is read at a time."""
  while stack := list(itertools.islice(arrays, count)):
    yield np.stack(stack)


def keyed(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[Place, list[str]]]:
  """The place of each array of a whole model, and its keys on disk as a file of the model has them.

  The keys of the base model have a prefix if the file also has a head, or the table says so.
  """
  found = places(table, shapes)
  prefix = ''
  if table.tied or table.prefixed or any(place.head for place in found):
    prefix = table.base
  pairs = []
  for place in found:
    keys = list(place.keys)
    if not place.head:
      keys = [prefix + key for key in keys]
    pairs.append((place, keys))
  return pairs


def _names(checkpoint: Checkpoint, table: Table) -> dict[str, str]:
  """{key as the table has it: key in the file}."""
  names = {}
  for name in checkpoint.shapes:
    bare = table.bare(name)
    key = re.sub(r'\.beta$', '.bias', bare)  # names of before 2019
    key = re.sub(r'\.gamma$', '.weight', key)
    # A head may have a module of the same name, which has no prefix.
    if key not in names or name != bare:
      names[key] = name
  return names


def _unfit(
  place: Place, names: Mapping[str, str], checkpoint: Checkpoint, edited: bool
) -> list[str]:
  """A sentence for every tensor of an array that is missing, or of another shape."""
  problems = []
  wanted = _shape_on_disk(place)
  for key in place.keys:
    if key not in names:
      near = nearest(key, names)
      hint = ''
      if near is not None:
        name = names[near]
        hint = f'; the nearest in the file: {name!r} of shape {list(checkpoint.shapes[name])}'
      problems.append(f'missing {key!r}, {list(wanted)} for {place.path}{hint}')
    elif not edited and checkpoint.shapes[names[key]] != wanted:
      problems.append(
        f'{names[key]!r} has the shape {list(checkpoint.shapes[names[key]])}, the model '
        f'needs {list(wanted)} for {place.path}'
      )
  return problems


def _unexpected(
  wanted: Iterable[Place],
  names: Mapping[str, str],
  checkpoint: Checkpoint,
  table: Table,
  layers: int | None,
) -> list[str]:
  """A sentence for every tensor that the model does not read, unless that is to be expected."""
  read = {key for place in wanted for key in place.keys}
  problems = []
  for key, name in names.items():
    if key in read or table.known(key) or _beyond(key, table, layers):
      continue
    near = nearest(key, read)
    hint = '' if near is None else f'; the nearest that is needed: {near!r}'
    problems.append(f'unexpected {name!r} of shape {list(checkpoint.shapes[name])}{hint}')
  return problems


def _shape_on_disk(place: Place) -> tuple[int, ...]:
  """The shape of the tensor that has an array, or a part of it."""
  shape = place.shape_on_disk
  return shape if place.part is None else place.part.whole(shape)


def _beyond(key: str, table: Table, layers: int | None) -> bool:
  """Whether a key belongs to a block that the model has dropped."""
  if layers is None:
    return False
  for pattern in table.block_keys():
    match = re.match(pattern, key)
    if match and int(match[1]) >= layers:
      return True
  return False
