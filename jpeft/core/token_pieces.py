"""Arrays of tokens as pieces of some tokens each.

Tokens may be cut over several devices, the parts of a row. A piece then has as many tokens of each
part, so that all devices work at each piece.

Axes: B batch, N tokens, P pieces, n tokens of a piece.
"""

import jax
import jax.numpy as jnp


def equal_pieces(length: int, most: int, parts: int = 1) -> int:
  """The tokens of a piece: of each part at most `most`, and so many that pieces are nearly alike.

  Args:
    length: N.
    most: tokens of a part.
    parts: devices that the tokens of a row are cut over.
  """
  length = -(-length // parts)
  count = -(-length // most)
  return parts * -(-length // count)


def cut_tokens(x: jax.Array, size: int, fill: int = 0, parts: int = 1) -> jax.Array:
  """[B, N, ...] as pieces [P, B, size, ...], filled up at the end."""
  each = size // parts
  length = -(-x.shape[1] // parts)
  count = -(-length // each)
  x = _padded(x, 1, parts * length, fill)
  x = x.reshape(x.shape[0], parts, length, *x.shape[2:])
  x = _padded(x, 2, count * each, fill)
  x = x.reshape(*x.shape[:2], count, each, *x.shape[3:])
  return jnp.moveaxis(x, 2, 0).reshape(count, x.shape[0], size, *x.shape[4:])


def joined_tokens(pieces: jax.Array, length: int, parts: int = 1) -> jax.Array:
  """Pieces [P, B, n, ...] as [B, length, ...]."""
  count, batch, size = pieces.shape[:3]
  x = pieces.reshape(count, batch, parts, size // parts, *pieces.shape[3:])
  x = jnp.moveaxis(x, 0, 2)
  x = x.reshape(batch, parts, -1, *x.shape[4:])[:, :, : -(-length // parts)]
  return x.reshape(batch, -1, *x.shape[3:])[:, :length]


def _padded(x: jax.Array, axis: int, length: int, fill: int) -> jax.Array:
  """x, an axis of it filled up to a length."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths, constant_values=fill)
