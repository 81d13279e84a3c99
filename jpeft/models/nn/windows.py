"""Windows of a grid of tokens, which attend apart from each other: Swin (arXiv:2103.14030).

Axes: B images, N tokens of a grid, W windows of S x S tokens, D width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from .positions import grid_distances


@dataclasses.dataclass(frozen=True)
class Windows:
  """How a grid of tokens is cut into windows.

  Attributes:
    grid: rows and columns of tokens. Where they are no multiple of `side`, rows and columns of
      zeros follow them, which are attended to like the others.
    side: S, rows and columns of a window.
    shift: by how much the windows are shifted down and right. Those that then hang over the end
      are filled from the start of the grid, and tokens that are no neighbours do not attend to each
      other.
  """

  grid: tuple[int, int]
  side: int
  shift: int = 0

  def __post_init__(self):
    if min(self.grid) < self.side:
      rows, columns = self.grid
      raise ValueError(
        f'windows of {self.side} x {self.side} tokens do not fit into {rows} x {columns}: load the '
        'model with a larger image_size='
      )

  @property
  def padded(self) -> tuple[int, int]:
    """Rows and columns of the grid, with those that fill the last windows."""
    rows, columns = (-(-length // self.side) * self.side for length in self.grid)
    return rows, columns

  def split(self, x):
    """The tokens [B, N, D] of each window: [B W, S S, D].

    Raises:
      ValueError: there are not as many as in the grid.
    """
    rows, columns = self.grid
    if x.shape[1] != rows * columns:
      raise ValueError(
        f'windows cut {rows} x {columns} patches, and the sequence has {x.shape[1]} tokens: a '
        'method that adds tokens to it has no place for them here'
      )
    x = rearrange(x, 'b (r c) d -> b r c d', r=rows)
    more_rows, more_columns = (new - old for new, old in zip(self.padded, self.grid, strict=True))
    x = jnp.pad(x, ((0, 0), (0, more_rows), (0, more_columns), (0, 0)))
    if self.shift:
      x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
    return rearrange(x, 'b (i s) (j t) d -> (b i j) (s t) d', s=self.side, t=self.side)

  def join(self, x):
    """The inverse of `split`."""
    rows, columns = self.padded
    x = rearrange(
      x,
      '(b i j) (s t) d -> b (i s) (j t) d',
      i=rows // self.side,
      j=columns // self.side,
      s=self.side,
    )
    if self.shift:
      x = jnp.roll(x, (self.shift, self.shift), (1, 2))
    rows, columns = self.grid
    return rearrange(x[:, :rows, :columns], 'b r c d -> b (r c) d')

  def mask(self, batch: int):
    """Which tokens of a window were neighbours before the shift: boolean [B W, 1, S S, S S].

    Args:
      batch: B.

    Returns:
      None without a shift.
    """
    if not self.shift:
      return None
    regions = []
    for length in self.padded:
      places = np.arange(length)
      end = (places >= length - self.side).astype(int)
      regions.append(end + (places >= length - self.shift))
    rows, columns = regions
    region = 3 * rows[:, None] + columns[None]
    region = rearrange(region, '(i s) (j t) -> (i j) (s t)', s=self.side, t=self.side)
    alike = region[:, :, None] == region[:, None]  # [W, S S, S S]
    return jnp.tile(alike[:, None], (batch, 1, 1, 1))


class WindowBias(nn.Module):
  """A learned logit for every head and distance in rows and columns of a window.

  Attributes:
    heads: number of heads.
    side: S, rows and columns of a window.
    dtype: of the result.
    param_dtype: of the table.
  """

  heads: int
  side: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: int):
    """Returns the bias [1, heads, S S, S S]; `tokens` is S S."""
    del tokens
    index = grid_distances((self.side, self.side))[1:, 1:]  # without a class token
    shape = ((2 * self.side - 1) ** 2, self.heads)
    table = self.param('embedding', nn.initializers.zeros, shape, self.param_dtype)
    return table.astype(self.dtype)[index].transpose(2, 0, 1)[None]
