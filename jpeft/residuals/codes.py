"""Codes of few bits, packed into bytes: of a derivative by a table, of values by groups."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .derivatives import Table

GROUP = 64


def pack(codes: jax.Array, bits: int = 4) -> jax.Array:
  """Codes below 2^bits, 8 / bits a byte: exactly ceil(n bits / 8) bytes of n codes.

  An axis that 8 / bits divides, the last such, is cut into that many planes, the first in the
  lowest bits: on accelerators this moves nothing between lanes. Without one the codes are packed
  flat, with zeros at the end.

  Args:
    codes: integers of any shape.
    bits: 1, 2, 4 or 8.
  """
  axis, planes = _axis(codes.shape, bits), 8 // bits
  codes = codes.astype(jnp.uint8)
  if axis is None:
    codes, axis = jnp.pad(codes.ravel(), (0, -codes.size % planes)), 0
  parts = jnp.split(codes, planes, axis)
  return sum((part << (bits * i) for i, part in enumerate(parts[1:], 1)), parts[0])


def unpack(packed: jax.Array, shape: tuple[int, ...], bits: int = 4) -> jax.Array:
  """The inverse of `pack`: uint8 codes of a shape."""
  axis, planes = _axis(shape, bits), 8 // bits
  mask = jnp.uint8(2**bits - 1)
  codes = jnp.concatenate([(packed >> (bits * i)) & mask for i in range(planes)], axis or 0)
  return codes if axis is not None else codes[: math.prod(shape)].reshape(shape)


def _axis(shape: tuple[int, ...], bits: int) -> int | None:
  return next((i for i in reversed(range(len(shape))) if shape[i] % (8 // bits) == 0), None)


def derivative_codes(x: jax.Array, t: Table) -> jax.Array:
  """#{i : borders[i] < x} as uint8; ties go down."""
  x = x.astype(jnp.float32)
  return sum((x > border).astype(jnp.uint8) for border in t.borders)


def bits_of(t: Table) -> int:
  return (len(t.levels) - 1).bit_length()


def look_up(codes: jax.Array, levels: tuple[float, ...]) -> jax.Array:
  """levels[codes] in float32, as a tree of selects, which every backend fuses; a power of two of
  levels.
  """
  values = [jnp.float32(level) for level in levels]
  for i in range((len(levels) - 1).bit_length()):
    bit = (codes & (1 << i)) != 0
    values = [
      jnp.where(bit, high, low) for low, high in zip(values[::2], values[1::2], strict=True)
    ]
  return values[0]


class Grouped(NamedTuple):
  """Values as codes between the least and the largest of each group: low + step * code."""

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
  rows = _grouped(x.astype(jnp.float32))
  low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
  low = low.astype(jnp.bfloat16)
  step = ((high - low.astype(jnp.float32)) / (2**bits - 1)).astype(jnp.bfloat16)
  wide = jnp.where(step > 0, step, 1).astype(jnp.float32)
  codes = jnp.clip(jnp.round((rows - low.astype(jnp.float32)) / wide), 0, 2**bits - 1)
  return Grouped(pack(codes.reshape(*rows.shape[:-2], -1), bits), step[..., 0], low[..., 0])


def decode(grouped: Grouped, shape: tuple[int, ...], dtype, bits: int = 4) -> jax.Array:
  """What `encode` kept of an array of that shape."""
  rows = jax.eval_shape(_grouped, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
  codes = unpack(grouped.packed, (*rows[:-2], rows[-2] * rows[-1]), bits).reshape(rows)
  x = (
    grouped.low[..., None].astype(jnp.float32) + grouped.step[..., None].astype(jnp.float32) * codes
  )
  return x.reshape(*rows[:-2], -1)[..., : _rows(shape)[1]].reshape(shape).astype(dtype)


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
  """(how many leading axes stay, the width of the merged others): groups are cut from rows of that
  width.
  """
  kept, width = len(shape), 1
  while kept and width < 2 * GROUP:
    kept -= 1
    width *= shape[kept]
  return kept, width


def _grouped(x: jax.Array) -> jax.Array:
  """x as [.., groups, group]; the last group is filled up with the last value."""
  kept, width = _rows(x.shape)
  group = min(GROUP, width)
  rows = x.reshape(*x.shape[:kept], width)
  rows = jnp.pad(rows, [(0, 0)] * kept + [(0, -width % group)], mode='edge')
  return rows.reshape(*x.shape[:kept], -1, group)
