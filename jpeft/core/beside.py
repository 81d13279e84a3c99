"""What a module is called with beside its stream, as a pytree that can be recorded."""

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax

from .discover import looks_like_array, named_arrays


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Held:
  """An argument, or a part of one, that is no array: a flag, a number, a function."""

  kind: type
  value: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Hole:
  """The place of an argument that is given later."""

  name: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
  """The arguments of a call without its stream, in the form they came: by position or by name.

  It is a pytree of the arrays among them. Of a scanned stack these come with the layers in front;
  what is no array is the same for all layers, and part of the structure.
  """

  args: tuple
  kwargs: dict[str, Any]
  names: tuple[str, ...] = dataclasses.field(metadata={'static': True})
  stream: str = dataclasses.field(metadata={'static': True})

  def by_name(self) -> dict[str, Any]:
    """The arguments by parameter name, each a pytree of its arrays."""
    return {**dict(zip(self.names, self.args, strict=True)), **self.kwargs}

  def with_stream(self, x: jax.Array, **others) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) of the same call on another stream.

    Args:
      x: the stream.
      **others: the arguments that were left out, by parameter name.
    """
    given = {**others, self.stream: x}

    def filled(node):
      if isinstance(node, _Hole):
        return given[node.name]
      return node.value if isinstance(node, _Held) else node

    return jax.tree.map(
      filled, (self.args, self.kwargs), is_leaf=lambda node: isinstance(node, _Held | _Hole)
    )


def beside(
  fn: Callable, args: tuple, kwargs: dict[str, Any], without: Collection[str] = ()
) -> Beside:
  """The arguments of a call without its stream, which is the first array.

  Args:
    fn: the unbound method.
    args, kwargs: of the call.
    without: parameters that are given where the module runs again.

  Raises:
    ValueError: an argument that is neither made of arrays nor can be compared with others.
  """
  stream = next(iter(named_arrays(fn, args, kwargs)))

  def kept(name: str, value):
    if name == stream or name in without:
      return _Hole(name)
    return jax.tree.map(lambda leaf: _kept(name, leaf), value)

  names = _names_of_positions(fn, len(args))
  return Beside(
    args=tuple(kept(name, value) for name, value in zip(names, args, strict=True)),
    kwargs={name: kept(name, value) for name, value in kwargs.items()},
    names=tuple(names),
    stream=stream,
  )


def _kept(name: str, leaf):
  if looks_like_array(leaf):
    return leaf
  try:
    hash(leaf)
  except TypeError:
    raise ValueError(
      f'{name!r} holds a {type(leaf).__name__}, which cannot go along to where the module runs '
      'again: pass arrays, or values that have a hash'
    ) from None
  return _Held(type(leaf), leaf)


def given_by_position(fn: Callable, count: int) -> set[str]:
  """The parameters of an unbound method that its first `count` arguments are for."""
  return set(_names_of_positions(fn, count))


def _names_of_positions(fn: Callable, count: int) -> list[str]:
  """The parameter names of arguments by position; the rest is numbered, as in `named_arrays`."""
  by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  parameters = list(inspect.signature(fn).parameters.values())[1:]  # without self
  names = [parameter.name for parameter in parameters if parameter.kind in by_position][:count]
  return names + [str(i) for i in range(count - len(names))]
