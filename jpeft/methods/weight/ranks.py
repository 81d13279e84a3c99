"""Entries of an array by the rank of their values, found without sorting."""

import jax
import jax.numpy as jnp


def of_rank(bits: jax.Array, rank, width: int = 31) -> jax.Array:
  """The `rank`-th smallest of integers from 0 to 2^width - 1, counted from 1; 0 for rank 0.

  It is found bit by bit, each by one comparison of all integers.
  """
  one = jnp.ones((), bits.dtype)

  def with_bit(i, found):
    larger = found | (one << (width - 1 - i).astype(bits.dtype))
    return jnp.where(jnp.sum(bits < larger) < rank, larger, found)

  return jax.lax.fori_loop(0, width, with_bit, jnp.zeros((), bits.dtype))


def smallest(values: jax.Array, count) -> jax.Array:
  """True for the `count` smallest values exactly; of equal ones for those that come first.

  Args:
    values: floats of any shape.
    count: a whole number that may be traced.
  """
  bits = _ordered(values)
  last = of_rank(bits, count, width=32)
  is_below = bits < last
  is_last = bits == last
  # Of the equal ones those of the lowest numbers: by rank again, since sums along so many entries
  # take a TPU long.
  size = values.size
  numbers = jnp.arange(size, dtype=jnp.uint32).reshape(values.shape)
  room = count - is_below.sum()
  end = of_rank(jnp.where(is_last, numbers, jnp.uint32(size)), room, size.bit_length())
  return is_below | (is_last & (numbers <= end) & (room > 0))


def _ordered(values: jax.Array) -> jax.Array:
  """Integers from 0 on that are ordered as the floats are; -0 and 0 are one."""
  values = values.astype(jnp.float32) + 0.0
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)
