"""4-bit integers of GGUF: Q4_0, and Q4_1 with the least weight of a block beside its scale."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import codes as arithmetic

from .blocks import Blocks, rounded

_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Int4(Blocks):
  """See `int4`."""

  block: int | None = _BLOCK

  name = 'int4'
  zero = 8

  def code(self, blocks):
    """The number of largest magnitude becomes -8; halves round up."""
    largest = jnp.argmax(jnp.abs(blocks), 1)[:, None]
    scale = jnp.take_along_axis(blocks, largest, 1)[:, 0] / -8
    x = blocks * jnp.where(scale == 0, 0, 1 / scale)[:, None]
    codes = jnp.clip(jnp.trunc(x + 8.5), 0, 15)
    return codes.astype(jnp.uint8), {'absmax': scale.astype(jnp.float16)}

  def value(self, codes, scale, zero):
    return arithmetic.lookup(codes, arithmetic.INT4) * scale


@dataclasses.dataclass(frozen=True)
class Int4Minimum(Blocks):
  """See `int4`."""

  block: int | None = _BLOCK

  name = 'int4_1'

  def code(self, blocks):
    """The least number becomes 0 and the largest 15; halves round up."""
    low = blocks.min(1)
    scale = (blocks.max(1) - low) / 15
    x = (blocks - low[:, None]) * jnp.where(scale == 0, 0, 1 / scale)[:, None]
    codes = jnp.clip(jnp.trunc(x + 0.5), 0, 15)
    facts = {'absmax': scale.astype(jnp.float16), 'zero': low.astype(jnp.float16)}
    return codes.astype(jnp.uint8), facts

  def value(self, codes, scale, zero):
    return rounded(codes.astype(jnp.float32) * scale) + zero


def int4(minimum: bool = False) -> Int4 | Int4Minimum:
  """4-bit integers in blocks of 32 with a float16 scale: Q4_0 of GGUF, 4.5 bits a weight.

  Args:
    minimum: also store the least weight of a block in float16, from which its codes count: Q4_1, 5
      bits a weight.
  """
  if minimum:
    return Int4Minimum()
  return Int4()
