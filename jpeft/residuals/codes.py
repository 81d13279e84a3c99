"""Codes of few bits, packed into bytes: of a derivative by a table, of values by groups."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

from .derivatives import Table

GROUP = 64


def pack(codes: jax.Array, bits: int = 4) -> jax.Array:
  """Codes below 2^bits, 8 / bits to a byte: exactly ceil(n bits / 8) bytes of n codes.

  The last axis that 8 / bits divides is packed, see `pallas_kernels.pack`. If there is none, the
  codes are packed flat, with zeros at the end.

  Args:
    codes: integers of any shape.
    bits: 1, 2, 4 or 8.
  """
  axis = _packed_axis(codes.shape, bits)
  if axis is None:
    return pallas_kernels.pack(codes.ravel(), bits)
  return pallas_kernels.pack(codes, bits, axis)


def unpack(packed: jax.Array, shape: tuple[int, ...], bits: int = 4) -> jax.Array:
  """The inverse of `pack`: uint8 codes of a shape."""
  axis = _packed_axis(shape, bits)
  if axis is None:
    return pallas_kernels.unpack(packed, bits)[: math.prod(shape)].reshape(shape)
  return pallas_kernels.unpack(packed, bits, axis)


def _packed_axis(shape: tuple[int, ...], bits: int) -> int | None:
  """The last axis that fills whole bytes; None if there is none."""
  for axis in reversed(range(len(shape))):
    if shape[axis] % (8 // bits) == 0:
      return axis
  return None


def derivative_codes(x: jax.Array, table: Table) -> jax.Array:
  """#{i : borders[i] < x} as uint8; ties go down."""
  x = x.astype(jnp.float32)
  return sum((x > border).astype(jnp.uint8) for border in table.borders)


def bits_of(table: Table) -> int:
  """The bits of a code of a table."""
  return (len(table.levels) - 1).bit_length()


def look_up(codes: jax.Array, levels: tuple[float, ...]) -> jax.Array:
  """levels[codes] in float32; the number of levels is a power of two."""
  return pallas_kernels.lookup(codes, np.asarray(levels, np.float32))


class Grouped(NamedTuple):
  """Values as codes between the least and the largest of each group: low + step * code.

  Attributes:
    packed: codes; uint8.
    step: one a group; bfloat16.
    low: one a group; bfloat16.
  """

  packed: jax.Array
  step: jax.Array
  low: jax.Array


def encode(x: jax.Array, bits: int = 4) -> Grouped:
  """Rounds to 2^bits levels between the least and the largest of each group.

  Trailing axes are merged until a row of features has two groups' width, so that no lane of an
  accelerator stays empty. Then x is [.., rows, features], and a group is

  - of rows (tokens) of one feature, all of them up to 256, else 128 neighbours: least and largest
    are found without moving a value between lanes, and a feature that is larger than others
    spoils only itself;
  - of 64 neighbouring features of one row, where there are fewer than 64 rows.

  Step and least value are bfloat16: at most 0.5 bit a value.

  Args:
    x: floats of any shape.
    bits: 4 or 8.
  """
  most = 2**bits - 1
  cut = _cut(x.shape)
  groups = cut.apart(x)
  low = groups.min(cut.axis, keepdims=True).astype(jnp.bfloat16)
  high = groups.max(cut.axis, keepdims=True).astype(jnp.float32)
  # From the rounded least value, with which `decode` starts too.
  start = low.astype(jnp.float32)
  step = ((high - start) / most).astype(jnp.bfloat16)
  scale = 1 / jnp.where(step > 0, step, 1).astype(jnp.float32)
  planes = [_rounded(*plane, most) for plane in _planes(cut, bits, groups, start, scale)]
  if len(planes) == 1:
    packed = pack(cut.together(planes[0]), bits)
  else:
    packed = _joined([cut.together(codes) for codes in planes], bits)
  return Grouped(packed, step.squeeze(cut.axis), low.squeeze(cut.axis))


def _rounded(groups: jax.Array, start: jax.Array, scale: jax.Array, most: int) -> jax.Array:
  """The nearest code of each value, as integers of 32 bits."""
  # A division a group, not one a value; truncation of what is above zero rounds down.
  raised = (groups.astype(jnp.float32) - start) * scale + 0.5
  return jnp.clip(raised, 0, most).astype(jnp.int32)


def _planes(cut: '_Cut', bits: int, *arrays: jax.Array) -> list[list[jax.Array]]:
  """The parts of arrays along their features of which `pack` has one a byte's place.

  Coded apart, and then put together, they are one pass over memory; codes of all features, packed
  later, are two.
  """
  count = 8 // bits
  if cut.axis == -1 or cut.merged[-1] % count:
    count = 1
  return [list(parts) for parts in zip(*(jnp.split(x, count, -1) for x in arrays), strict=True)]


def _joined(planes: list[jax.Array], bits: int) -> jax.Array:
  """`pack` of codes that are in their planes already."""
  packed = planes[0]
  for place, plane in enumerate(planes[1:], 1):
    packed = packed | (plane << (bits * place))
  return packed.astype(jnp.uint8)


def decode(grouped: Grouped, shape: tuple[int, ...], dtype, bits: int = 4) -> jax.Array:
  """What `encode` stored of an array of that shape."""
  cut = _cut(shape)
  codes = cut.apart(unpack(grouped.packed, cut.merged, bits))
  low = jnp.expand_dims(grouped.low, cut.axis).astype(jnp.float32)
  step = jnp.expand_dims(grouped.step, cut.axis).astype(jnp.float32)
  values = low + step * codes.astype(jnp.float32)
  return cut.together(values.astype(dtype)).reshape(shape)


class _Cut(NamedTuple):
  """How an array is cut in groups.

  Attributes:
    merged: its shape with trailing axes merged.
    axis: which is cut, -1 or -2.
    size: of a group.
  """

  merged: tuple[int, ...]
  axis: int
  size: int

  def apart(self, x: jax.Array) -> jax.Array:
    """x with the cut axis as [groups, size]; the last group is filled up with the last value."""
    x = x.reshape(self.merged)
    length = self.merged[self.axis]
    missing = -length % self.size
    if missing:
      widths = [(0, 0)] * x.ndim
      widths[self.axis] = (0, missing)
      x = jnp.pad(x, widths, mode='edge')
    place = x.ndim + self.axis
    return x.reshape(*x.shape[:place], -1, self.size, *x.shape[place + 1 :])

  def together(self, groups: jax.Array) -> jax.Array:
    """The inverse of `apart`, of the merged shape."""
    place = len(self.merged) + self.axis
    joined = groups.reshape(*groups.shape[:place], -1, *groups.shape[place + 2 :])
    return jax.lax.slice_in_dim(joined, 0, self.merged[place], axis=place)


def _cut(shape: tuple[int, ...]) -> _Cut:
  leading = len(shape)
  width = 1
  while leading and width < 2 * GROUP:
    leading -= 1
    width *= shape[leading]
  merged = (*shape[:leading], width)
  rows = merged[-2] if leading else 1
  if rows < GROUP:
    return _Cut(merged, -1, min(GROUP, width))
  if rows <= 4 * GROUP:
    return _Cut(merged, -2, rows)
  return _Cut(merged, -2, 2 * GROUP)
