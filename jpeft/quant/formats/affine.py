"""Integers with a scale and a zero point for every output channel, as PEQA trains them."""

import dataclasses

import jax.numpy as jnp

from .blocks import Blocks, checked


@dataclasses.dataclass(frozen=True)
class Affine(Blocks):
  """See `affine`."""

  name = 'affine'

  def code(self, blocks):
    """Rounds to nearest between the least and the largest weight, 0 among them: 0 stays 0."""
    most = 2**self.bits - 1
    low = jnp.minimum(blocks.min(1), 0)
    high = jnp.maximum(blocks.max(1), 0)
    scale = (high - low) / most
    step = jnp.where(scale == 0, 1, scale)
    zero = jnp.round(-low / step)
    codes = jnp.clip(jnp.round(blocks / step[:, None]) + zero[:, None], 0, most)
    return codes.astype(jnp.uint8), {'absmax': scale, 'zero': zero.astype(jnp.uint8)}

  def value(self, codes, scale, zero):
    return (codes.astype(jnp.float32) - zero) * scale


def affine(block: int | None = None, bits: int = 4) -> Affine:
  """Integers with a scale and a zero point for every output channel: (code - zero) * scale.

  Args:
    block: weights of a channel that share both; None for the whole channel.
    bits: levels are 2^bits; each code takes 4 bits all the same.

  Raises:
    ValueError: a number of bits or a block that is not supported.
  """
  if bits not in (2, 3, 4):
    raise ValueError(f'affine: bits={bits} must be 2, 3 or 4')
  form = Affine(block, bits=bits)
  if block is None:
    return form
  return checked(form)
