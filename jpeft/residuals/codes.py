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
  """Rounds to 2^bits levels a group of 64 neighbours along the last axis.

  Axes are merged from the end until two groups lie side by side, so that no lane of an accelerator
  stays empty. Step and least value are bfloat16: 4.5 bits a value at 4 bits.

  Args:
    x: floats of any shape.
    bits: 4 or 8.
  """
  most = 2**bits - 1
  groups = _grouped(x.astype(jnp.float32))  # [.., groups, group]
  low = groups.min(-1, keepdims=True).astype(jnp.bfloat16)
  high = groups.max(-1, keepdims=True)
  # From the rounded least value, with which `decode` starts too.
  start = low.astype(jnp.float32)
  step = ((high - start) / most).astype(jnp.bfloat16)
  divisor = jnp.where(step > 0, step, 1).astype(jnp.float32)
  codes = jnp.clip(jnp.round((groups - start) / divisor), 0, most)
  rows = codes.reshape(*groups.shape[:-2], -1)
  return Grouped(pack(rows, bits), step[..., 0], low[..., 0])


def decode(grouped: Grouped, shape: tuple[int, ...], dtype, bits: int = 4) -> jax.Array:
  """What `encode` stored of an array of that shape."""
  groups = jax.eval_shape(_grouped, jax.ShapeDtypeStruct(shape, jnp.float32))
  *leading, count, size = groups.shape
  codes = unpack(grouped.packed, (*leading, count * size), bits).reshape(groups.shape)
  low = grouped.low[..., None].astype(jnp.float32)
  step = grouped.step[..., None].astype(jnp.float32)
  rows = (low + step * codes).reshape(*leading, -1)
  _, width = _rows(shape)
  return rows[..., :width].reshape(shape).astype(dtype)


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
  """(how many leading axes stay, the width of the others merged: a row, which is cut in groups)."""
  leading = len(shape)
  width = 1
  while leading and width < 2 * GROUP:
    leading -= 1
    width *= shape[leading]
  return leading, width


def _grouped(x: jax.Array) -> jax.Array:
  """x as [.., groups, group]; the last group is filled up with the last value."""
  leading, width = _rows(x.shape)
  group = min(GROUP, width)
  rows = x.reshape(*x.shape[:leading], width)
  padding = [(0, 0)] * leading + [(0, -width % group)]
  rows = jnp.pad(rows, padding, mode='edge')
  return rows.reshape(*x.shape[:leading], -1, group)
