"""Reads the weights and the graph of an ONNX file as data: the few fields of its protobuf we need.

The wire format is a list of (field number << 3 | type) tags, each followed by a varint (type 0), 8
bytes (1), a length and so many bytes (2), or 4 bytes (5).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Numbers of the fields that are read.
_MODEL_GRAPH = 7
_GRAPH_NODE = 1
_GRAPH_TENSOR = 5
_NODE_INPUT = 1
_NODE_OUTPUT = 2
_NODE_OP = 4
_TENSOR_DIMS = 1
_TENSOR_TYPE = 2
_TENSOR_NAME = 8
_TENSOR_DATA = 9

# Number of a tensor's type -> its type in numpy.
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
    model = _values(memoryview(data))
    if _MODEL_GRAPH not in model:
      raise ValueError('it has no graph')
    graph = _values(model[_MODEL_GRAPH][0])
    nodes = [_node(value) for value in graph.get(_GRAPH_NODE, ())]
    tensors = dict(_tensor(value) for value in graph.get(_GRAPH_TENSOR, ()))
  except (IndexError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{name} is no readable ONNX file ({error}); it is damaged or was not copied whole'
    ) from error
  return Graph(tensors, nodes)


def _node(data: memoryview) -> Node:
  values = _values(data)

  def texts(field):
    return [_text(value) for value in values.get(field, ())]

  return Node(texts(_NODE_OP)[0], texts(_NODE_INPUT), texts(_NODE_OUTPUT))


def _tensor(data: memoryview) -> tuple[str, np.ndarray]:
  """(name, array) of a tensor."""
  values = _values(data)
  name = _text(values[_TENSOR_NAME][0])
  shape = []
  for value in values.get(_TENSOR_DIMS, ()):
    # Each axis has a field of its own, or one field has several (packed).
    shape += [value] if isinstance(value, int) else _varints(value)
  if _TENSOR_DATA not in values:
    raise ValueError(f'the tensor {name!r} is not stored as raw data')
  dtype = _TYPES[values[_TENSOR_TYPE][0]]
  return name, np.frombuffer(values[_TENSOR_DATA][0], dtype).reshape(shape)


def _text(value: memoryview) -> str:
  return bytes(value).decode()


def _values(data: memoryview) -> dict[int, list[int | memoryview]]:
  """{field: its values, in the order of the file} of a message."""
  values = {}
  for field, value in _fields(data):
    values.setdefault(field, []).append(value)
  return values


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  """(field, value) of a message: numbers of type 0, else the bytes."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    kind = tag & 7
    if kind == 0:
      value, at = _varint(data, at)
      yield tag >> 3, value
      continue
    if kind == 1:
      size = 8
    elif kind == 2:
      size, at = _varint(data, at)
    elif kind == 5:
      size = 4
    else:
      raise ValueError(f'wire type {kind} at byte {at}')
    value = data[at : at + size]
    if len(value) < size:
      raise ValueError(f'a field of {size} bytes ends after {len(value)}')
    at += size
    yield tag >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  """(number, next byte): 7 bits a byte, low ones first; the top bit is set if a byte follows."""
  value = 0
  shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at += 1
    shift += 7
    if byte < 128:
      return value, at
    if shift > 63:
      raise ValueError(f'a number of more than 64 bits before byte {at}')


def _varints(data: memoryview) -> Iterator[int]:
  at = 0
  while at < len(data):
    value, at = _varint(data, at)
    yield value
