"""Arrays that are computed where, and each time, the model reads them: in Linen and in NNX
alike.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.core import meta


class Box(meta.AxisMetadata):
  """An array in the backbone that is computed when it is read.

  Linen unboxes it in `self.param`, NNX in `variable[...]` and through on_get_value. A subclass is
  a pytree that gives `unbox()`, `shape` and `dtype`; under a scan each layer sees its own slice.
  """

  def __getitem__(self, index):
    return self.unbox()[index]

  @property
  def ndim(self) -> int:
    return len(self.shape)

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
    return read(self.fn(self.theta, Reader(self.arrays))[self.name]).astype(self.dtype)

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


def read(x):
  """The plain array behind a box; any other value as it is."""
  return x.unbox() if isinstance(x, Box) else x


class Reader(Mapping):
  """The arrays of a site by name; a box is computed only when it is asked for."""

  def __init__(self, arrays: Mapping[str, Any], transform=read):
    self._arrays, self._transform = arrays, transform

  def __getitem__(self, name: str):
    return self._transform(self._arrays[name])

  def stored(self, name: str):
    """The array as it is held: a box stays one."""
    return self._arrays[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._arrays)

  def __len__(self) -> int:
    return len(self._arrays)


@contextlib.contextmanager
def inject(module, **fields):
  """Sets a module's own injection points (dot_general, attention_fn) for the length of one call."""
  old = {name: getattr(module, name) for name in fields}
  try:
    for name, value in fields.items():
      object.__setattr__(module, name, value)
    yield
  finally:
    for name, value in old.items():
      object.__setattr__(module, name, value)
