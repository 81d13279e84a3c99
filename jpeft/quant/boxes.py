"""4-bit kernels in the backbone: boxes that are decoded where, and each time, the model reads
them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import Box, Leaf

from .formats import Format


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['arrays'], meta_fields=['form', 'leaf', 'axes']
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(Box):
  """A kernel, or a stack of them, in 4 bits.

  Attributes:
    arrays: what `Format.encode` gives for the folded matrix; stacked layers and experts lead, or
      where the stack of the kernel is not in front, it is where the kernel has it.
    form: the format.
    leaf: how one layer's kernel stands for a matrix.
    axes: of the stored kernel that stack layers.
  """

  arrays: dict[str, jax.Array]
  form: Format
  leaf: Leaf
  axes: tuple[int, ...]

  def unbox(self) -> jax.Array:
    decode = lambda arrays: self.leaf.unfold(self._matrix(arrays))
    if not self._stacked:
      own = self._own
      return decode({n: x.reshape(own[n].shape) for n, x in self.arrays.items()}).astype(self.dtype)
    for _ in self.axes:
      decode = jax.vmap(decode)
    lead = lambda x: jnp.moveaxis(x, self.axes, range(len(self.axes)))
    own, count = self._own, len(self.axes)
    arrays = {n: lead(x) for n, x in self.arrays.items()}
    out = decode({n: x.reshape(*x.shape[:count], *own[n].shape) for n, x in arrays.items()})
    return jnp.moveaxis(out, range(count), self.axes).astype(self.dtype)

  def _matrix(self, arrays):
    decode = lambda arrays: self.form.decode(arrays, (self.leaf.fan_in, self.leaf.fan_out))
    return _each(decode, self.leaf)(arrays)

  def scales(self) -> jax.Array:
    """The scale of every block of one layer, float32, as its 'absmax' lies."""
    decode, own = (
      lambda arrays: self.form.scales(arrays, (self.leaf.fan_in, self.leaf.fan_out)),
      self._own,
    )
    return _each(decode, self.leaf)({n: self.arrays[n].reshape(own[n].shape) for n in own})

  def rescaled(self, scales: jax.Array) -> 'Quantized':
    """The same codes with other scales, which are then stored as they are given."""
    rest = {n: x for n, x in self.arrays.items() if n not in ('nested', 'offset')}
    return dataclasses.replace(self, arrays={**rest, 'absmax': scales}, form=self.form.single())

  @functools.cached_property
  def _own(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one layer."""
    return _shapes(self.form, self.leaf)

  @property
  def _stacked(self) -> bool:
    """Whether all layers are here; inside a scan there is one."""
    codes = self._own['codes'].shape
    return bool(self.axes) and self.arrays['codes'].ndim == max(
      len(codes) + len(self.axes), max(self.axes) + 1
    )

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.leaf.shape)
    for axis in sorted(self.axes) if self._stacked else ():
      shape.insert(axis, self.arrays['codes'].shape[axis])
    return tuple(shape)

  @property
  def dtype(self):
    return self.leaf.dtype


def _encoded(form: Format, leaf: Leaf, w) -> dict[str, jax.Array]:
  return _each(form.encode, leaf)(leaf.fold(w))


def _shapes(form: Format, leaf: Leaf) -> dict[str, jax.ShapeDtypeStruct]:
  """What `_encoded` gives of a layer."""
  return jax.eval_shape(
    functools.partial(_encoded, form, leaf), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  )


def _each(fn, leaf: Leaf):
  """A function of a matrix, for every matrix of a kernel."""
  for _ in leaf.batch:
    fn = jax.vmap(fn)
  return fn


def nbytes(tree: Any) -> int:
  """The bytes that the arrays of a tree take as they are stored: packed where they are
  quantized.
  """
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
