"""Reads the weights and the graph of an ONNX file as data: the few fields of its protobuf we need.

The wire format is a list of (field number << 3 | type) tags, each followed by a varint (type 0), 8
bytes (1), a length and so many bytes (2), or 4 bytes (5).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_TYPES = {1: '<f4', 6: '<i4', 7: '<i8', 10: '<f2', 11: '<f8'}


class Node(NamedTuple):
  """One operation: its type and the names of what it reads and writes."""

  op: str
  inputs: list[str]
  outputs: list[str]


class Graph(NamedTuple):
  """The stored tensors of a file and its operations in order."""

  tensors: dict[str, np.ndarray]
  nodes: list[Node]


def read(data: bytes, name: str) -> Graph:
  """Parses an ONNX file.

  Args:
    data: its bytes.
    name: what to call it in errors.

  Raises:
    ValueError: the bytes are no ONNX file, or one that was cut.
  """
  try:
    graphs = [value for field, value in _fields(memoryview(data)) if field == 7]
    fields = list(_fields(graphs[0]))
    nodes = [_node(value) for field, value in fields if field == 1]
    tensors = dict(_tensor(value) for field, value in fields if field == 5)
  except (IndexError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{name} is no readable ONNX file ({error}); it is damaged or was not copied whole'
    ) from error
  return Graph(tensors, nodes)


def _node(data: memoryview) -> Node:
  fields = list(_fields(data))
  text = lambda number: [bytes(value).decode() for field, value in fields if field == number]
  return Node(text(4)[0], text(1), text(2))


def _tensor(data: memoryview) -> tuple[str, np.ndarray]:
  fields = list(_fields(data))
  first = {field: value for field, value in reversed(fields)}
  shape = [
    n
    for field, value in fields
    if field == 1
    for n in ([value] if isinstance(value, int) else _varints(value))
  ]
  if 9 not in first:
    raise ValueError(f'the tensor {bytes(first[8]).decode()!r} is not stored as raw data')
  array = np.frombuffer(first[9], _TYPES[first[2]]).reshape(shape)
  return bytes(first[8]).decode(), array


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    kind = tag & 7
    if kind == 0:
      value, at = _varint(data, at)
    elif kind in (1, 2, 5):
      size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
      value = data[at : at + size]
      if len(value) < size:
        raise ValueError(f'a field of {size} bytes ends after {len(value)}')
      at += size
    else:
      raise ValueError(f'wire type {kind} at byte {at}')
    yield tag >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at
    if shift > 63:
      raise ValueError(f'a number of more than 64 bits before byte {at}')


def _varints(data: memoryview) -> Iterator[int]:
  at = 0
  while at < len(data):
    value, at = _varint(data, at)
    yield value
