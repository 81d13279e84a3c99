"""Arrays of tokens as pieces of some tokens each.

Axes: B batch, N tokens, P pieces, n tokens of a piece.
"""

import jax
import jax.numpy as jnp


def equal_pieces(length: int, most: int) -> int:
  """The tokens of a piece: at most `most`, and so many that pieces of `length` are nearly alike."""
  count = -(-length // most)
  return -(-length // count)


def cut_tokens(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
  """[B, N, ...] as pieces [P, B, size, ...], filled up at the end."""
  missing = -x.shape[1] % size
  x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def joined_tokens(pieces: jax.Array, length: int) -> jax.Array:
  """Pieces [P, B, n, ...] as [B, length, ...]."""
  x = jnp.moveaxis(pieces, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
