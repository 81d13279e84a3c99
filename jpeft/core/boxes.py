"""Arrays that are computed each time the model reads them, in Linen and in NNX alike."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.core import meta

# What an array offers by name: T, reshape, astype and so on.
_ARRAY_METHODS = {name for name in dir(jax.Array) if not name.startswith('_')}


def _operator(name: str):
  def operate(self, *others):
    return getattr(self.unbox(), name)(*(read(other) for other in others))

  return operate


def _with_operators(cls):
  names = ['neg']
  for name in ('add', 'sub', 'mul', 'truediv', 'matmul', 'pow'):
    names += [name, f'r{name}']
  for name in names:
    setattr(cls, f'__{name}__', _operator(f'__{name}__'))
  return cls


@_with_operators
class Box(meta.AxisMetadata):
  """An array of the backbone that is computed when it is read.

  Linen unboxes it in `self.param`, NNX in `variable[...]` and through on_get_value. A subclass is
  a pytree that gives `unbox()`, `shape` and `dtype`; under a scan each layer sees its own slice.
  """

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def refusal(self, dtype) -> str | None:
    """Why `multiply` cannot take rows of a dtype; None if it can."""
    del dtype
    return 'it is computed whole'

  def multiply(self, x: jax.Array, transposed: bool = False) -> jax.Array:
    """x @ m of the matrix m [fan_in, fan_out] of the array, which need not be computed whole.

    Args:
      x: [..., fan_in], of a dtype that `refusal` has nothing against.
      transposed: x @ m^T of x [..., fan_out].
    """
    raise NotImplementedError

  # A model that reads `module.variables` gets the box itself, and uses it as the array.

  def __jax_array__(self) -> jax.Array:
    return self.unbox()

  def __getitem__(self, index):
    return self.unbox()[index]

  def __getattr__(self, name: str):
    if name not in _ARRAY_METHODS:
      raise AttributeError(f'{type(self).__name__!r} object has no attribute {name!r}')
    return getattr(self.unbox(), name)

  def replace_boxed(self, value):
    return value

  def add_axis(self, index, params):
    return self

  def remove_axis(self, index, params):
    return self


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Lazy(Box):
  """Stands for fn(theta, arrays)[name], cast to the dtype of the array it replaces."""

  arrays: dict
  theta: Any
  fn: Any
  name: str

  def unbox(self) -> jax.Array:
    new = self.fn(self.theta, Reader(self.arrays))[self.name]
    return read(new).astype(self.dtype)

  def refusal(self, dtype) -> str | None:
    """See `Box.refusal`."""
    del dtype
    return 'a method changes it at each step'

  @property
  def shape(self) -> tuple[int, ...]:
    return self.arrays[self.name].shape

  @property
  def dtype(self):
    return self.arrays[self.name].dtype

  def tree_flatten(self):
    return (self.arrays, self.theta), (self.fn, self.name)

  @classmethod
  def tree_unflatten(cls, static, children):
    return cls(*children, *static)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Probe(Box):
  """Stands for an array as it is, to see whether a model takes boxes."""

  array: Any

  def unbox(self):
    return self.array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape

  @property
  def dtype(self):
    return self.array.dtype

  def tree_flatten(self):
    return (self.array,), None

  @classmethod
  def tree_unflatten(cls, static, children):
    return cls(*children)


def read(x):
  """The array that a box stands for; any other value as it is."""
  if isinstance(x, Box):
    return x.unbox()
  return x


class Reader(Mapping):
  """Arrays by name; a box is computed each time it is read."""

  def __init__(self, arrays: Mapping[str, Any]):
    self._arrays = arrays

  def __getitem__(self, name: str):
    return read(self._arrays[name])

  def stored(self, name: str):
    """The array as it is stored: a box stays one."""
    return self._arrays[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._arrays)

  def __len__(self) -> int:
    return len(self._arrays)


class Arrays(Reader):
  """The arrays of a site by name, as the `init` of a rule gets them.

  Attributes:
    model: all arrays of the backbone by 'path/name', as stored: stacked layers with their stack.
    number: of the layer, from 0 on; None outside of layers. In a stack it is traced.
  """

  def __init__(self, arrays: Mapping[str, Any], model: Mapping[str, Any], number=None):
    super().__init__(arrays)
    self.model = Reader(model)
    self.number = number
