"""Kernels of the backbone in 4 bits: boxes that are decoded each time that the model reads them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from jpeft.core import Box, Leaf

from .formats import Format


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['arrays'],
  meta_fields=['form', 'leaf', 'axes', 'implementation'],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(Box):
  """A kernel, or a stack of them, in 4 bits.

  Attributes:
    arrays: what `Format.encode` returns for the folded matrix; axes of experts come before. The
      axes that stack layers are where the stored kernel has them.
    form: the format.
    leaf: how one layer's kernel stands for a matrix.
    axes: of the stored kernel that stack layers.
    implementation: 'auto' for products by `pallas_kernels` where they are faster, 'xla' for none.
  """

  arrays: dict[str, jax.Array]
  form: Format
  leaf: Leaf
  axes: tuple[int, ...]
  implementation: str = 'auto'

  def unbox(self) -> jax.Array:
    """The kernel, or the stack of them, decoded."""
    axes = self._stack_axes
    front = range(len(axes))
    arrays = {}  # [*stack, *shape of one layer]
    for name, shape in self._layer_shapes.items():
      x = jnp.moveaxis(self.arrays[name], axes, front)
      arrays[name] = x.reshape(*x.shape[: len(axes)], *shape)
    decode = self._decode_layer
    for _ in axes:
      decode = jax.vmap(decode)
    return jnp.moveaxis(decode(arrays), front, axes).astype(self.dtype)

  def _decode_layer(self, arrays: dict[str, jax.Array]) -> jax.Array:
    def decode(arrays):
      return self.form.decode(arrays, self._matrix_shape)

    return self.leaf.unfold(each_matrix(decode, self.leaf)(arrays))

  def refusal(self, dtype) -> str | None:
    """Why the kernel is decoded for rows of a dtype, whatever the platform; None if it need not."""
    dtype = jnp.dtype(dtype)
    if self.implementation == 'xla':
      return "implementation='xla' was asked for"
    if self.leaf.batch or self._stacked:
      return 'it is a stack of matrices'
    if self.form.name not in pallas_kernels.codes.VALUES:
      return f'the format {self.form.name} has no table of 16 values'
    if self.form.block is None or self.leaf.fan_in % (2 * self.form.block):
      return f'a block of {self.form.block} crosses the middle of {self.leaf.fan_in} rows'
    if self.dtype not in (jnp.float32, dtype):
      return f'it stands for {self.dtype}, which {dtype} does not keep'
    exact = jax.config.jax_default_matmul_precision in ('float32', 'highest')
    if dtype == jnp.float32 and not exact:
      return 'products of float32 have the default precision, and those of kernels are exact'
    return None

  def multiply(self, x: jax.Array, transposed: bool = False) -> jax.Array:
    """See `Box.multiply`: by `pallas_kernels`, where what runs is chosen for the platform."""
    codes = self.arrays['codes'].reshape(self._layer_shapes['codes'])
    return pallas_kernels.nf4_product(
      x, codes, self.scales(), form=self.form, transposed=transposed
    )

  def scales(self) -> jax.Array:
    """The scale of every block of one layer, float32, laid out as its 'absmax'."""

    def scales(arrays):
      return self.form.scales(arrays, self._matrix_shape)

    arrays = {name: self.arrays[name].reshape(shape) for name, shape in self._layer_shapes.items()}
    return each_matrix(scales, self.leaf)(arrays)

  def rescaled(self, scales: jax.Array) -> 'Quantized':
    """The same codes with other scales, which are then stored as they are given."""
    arrays = {name: x for name, x in self.arrays.items() if name not in ('nested', 'offset')}
    arrays['absmax'] = scales
    return dataclasses.replace(self, arrays=arrays, form=self.form.single())

  @property
  def _matrix_shape(self) -> tuple[int, int]:
    return self.leaf.fan_in, self.leaf.fan_out

  @functools.cached_property
  def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays of one layer."""
    return {name: x.shape for name, x in encoded_shapes(self.form, self.leaf).items()}

  @property
  def columns(self) -> dict[str, int | None]:
    """{name of an array: its axis with one entry for each column of the matrix, or None}."""
    found: dict[str, int | None] = {}
    for name, shape in self._layer_shapes.items():
      own = [axis for axis in range(self.arrays[name].ndim) if axis not in self._stack_axes]
      is_matrix = len(shape) == len(self.leaf.batch) + 2
      found[name] = own[len(shape) - 1] if is_matrix else None
    return found

  @property
  def _stack_axes(self) -> tuple[int, ...]:
    """The axes that stack layers, as far as they are here."""
    return self.axes if self._stacked else ()

  @property
  def _stacked(self) -> bool:
    """Whether all layers are here; inside a scan there is one."""
    if not self.axes:
      return False
    stacked = len(self._layer_shapes['codes']) + len(self.axes)
    # Codes with too few axes for the place of the stack have axes of one behind.
    return self.arrays['codes'].ndim == max(stacked, max(self.axes) + 1)

  @property
  def shape(self) -> tuple[int, ...]:
    if not self._stacked:
      return tuple(self.leaf.shape)
    shape = list(self.leaf.shape)
    for axis in sorted(self.axes):
      shape.insert(axis, self.arrays['codes'].shape[axis])
    return tuple(shape)

  @property
  def dtype(self):
    return self.leaf.dtype


def encoded(form: Format, leaf: Leaf, w: jax.Array) -> dict[str, jax.Array]:
  """The arrays of one layer's kernel in 4 bits."""
  return each_matrix(form.encode, leaf)(leaf.fold(w))


def encoded_shapes(form: Format, leaf: Leaf) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of what `encoded` returns."""
  kernel = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return jax.eval_shape(functools.partial(encoded, form, leaf), kernel)


def each_matrix(fn: Callable, leaf: Leaf) -> Callable:
  """A function of a matrix, over every matrix of a kernel (one an expert)."""
  for _ in leaf.batch:
    fn = jax.vmap(fn)
  return fn


def nbytes(tree: Any) -> int:
  """The bytes of the arrays of a tree as they are stored: packed where they are quantized."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
