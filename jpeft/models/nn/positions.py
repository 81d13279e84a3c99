"""Positions: tables of ViTs resized for other images, and relative positions of T5 and BEiT."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from .rope import check_grid

# Rows of a table of `GridBias` behind those of distances: from the class token, to it, and of it to
# itself.
_SPECIAL = 3


def check_positions(tokens: int, longest: int, more: str = '') -> None:
  """Raises a ValueError if a text has more tokens than positions; `more` is another way out."""
  if tokens > longest:
    raise ValueError(
      f'{tokens} tokens are more than the {longest} positions that the model knows; truncate the '
      f'text (data.max_length of a config){more}'
    )


def resize_grid(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """Resizes the patches of a position table; the rows of its first tokens (class, ..) stay.

  Bicubic with the kernel constant -0.75, half-pixel centres, repeated borders and no smoothing:
  the rule that published checkpoints are evaluated with, not the one of jax.image (-0.5).

  Args:
    table: [1, first + old rows * old columns, D], where `first` rows are not of patches.
    old: rows and columns of the table.
    new: rows and columns wanted.

  Returns:
    An array [1, first + new rows * new columns, D] of the table's dtype.
  """
  first = table.shape[1] - old[0] * old[1]
  patches = _resized(table[0, first:], old, new, _bicubic)
  return np.concatenate([table[:, :first], patches[None]], 1)


def resize_distances(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """Resizes a table of `GridBias`; its last rows, which stand for no distance, stay.

  Bilinear with half-pixel centres, repeated borders and no smoothing, as transformers does it.

  Args:
    table: [distances of the old grid + 3, heads].
    old: rows and columns of patches that the table was made for.
    new: rows and columns wanted.

  Returns:
    An array [distances of the new grid + 3, heads] of the table's dtype.
  """
  distances = _resized(table[:-_SPECIAL], _distances(old), _distances(new), _bilinear)
  return np.concatenate([distances, table[-_SPECIAL:]])


def _resized(x: np.ndarray, old, new, weights) -> np.ndarray:
  """Resizes x [old rows * old columns, D], by `weights` of each axis, to the new size."""
  dtype = x.dtype
  x = rearrange(x.astype(np.float64), '(i j) d -> i j d', i=old[0], j=old[1])
  rows = weights(old[0], new[0])  # [new rows, old rows]
  columns = weights(old[1], new[1])  # [new columns, old columns]
  resized = np.einsum('ri,cj,ijd->rcd', rows, columns, x, optimize=True)
  return rearrange(resized, 'r c d -> (r c) d').astype(dtype)


def _bilinear(old: int, new: int) -> np.ndarray:
  """The matrix [new, old] that resizes one axis by straight lines between its pixels."""
  centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(old)))


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """The matrix [new, old] that resizes one axis (Keys, 1981)."""
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(centre).astype(int)
  matrix = np.zeros((new, old))
  for offset in range(-1, 3):  # the four old pixels around each new one
    x = np.abs(centre - first - offset)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    weight = np.where(x <= 1, near, far)
    neighbour = np.clip(first + offset, 0, old - 1)
    np.add.at(matrix, (np.arange(new), neighbour), weight)  # at a border several weights add up
  return matrix


def relative_buckets(
  queries: int, keys: int, *, buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
  """The bucket of the distance from each query to each key.

  Near distances have a bucket each, far ones share buckets that widen logarithmically up to
  max_distance. If bidirectional, half of the buckets are for keys after the query; if not, all
  those keys are in bucket 0.

  Args:
    queries: number of queries.
    keys: number of keys.
    buckets: number of buckets.
    max_distance: from here on distances share the last bucket.
    bidirectional: whether keys after the query are told apart.

  Returns:
    Integers [queries, keys] in [0, buckets).
  """
  distance = np.arange(keys)[None] - np.arange(queries)[:, None]  # [queries, keys]
  offset = 0
  if bidirectional:
    buckets //= 2
    offset = buckets * (distance > 0)
    distance = np.abs(distance)
  else:
    distance = np.maximum(-distance, 0)
  exact = buckets // 2
  # In float32 and truncated, since published weights were trained with what that gives.
  far = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
  far = far / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)
  far = np.minimum(exact + far.astype(np.int32), buckets - 1)
  return offset + np.where(distance < exact, distance, far)


class PositionBias(nn.Module):
  """A learned logit for every head and bucket of relative distance.

  Attributes:
    heads: number of heads.
    buckets: rows of the table.
    max_distance: from here on distances share the last bucket.
    bidirectional: whether keys after the query are told apart.
    dtype: of the result.
    param_dtype: of the table.
  """

  heads: int
  buckets: int = 32
  max_distance: int = 128
  bidirectional: bool = True
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, queries: int, keys: int):
    """Returns the bias [1, heads, queries, keys]."""
    table = self.param(
      'embedding', nn.initializers.lecun_normal(), (self.buckets, self.heads), self.param_dtype
    )
    buckets = relative_buckets(
      queries,
      keys,
      buckets=self.buckets,
      max_distance=self.max_distance,
      bidirectional=self.bidirectional,
    )
    bias = table.astype(self.dtype)[buckets]  # [queries, keys, heads]
    return bias.transpose(2, 0, 1)[None]


def _distances(grid: tuple[int, int]) -> tuple[int, int]:
  """How many distances there are between rows, and between columns, of a grid."""
  return 2 * grid[0] - 1, 2 * grid[1] - 1


def grid_distances(grid: tuple[int, int]) -> np.ndarray:
  """The row of the table of `GridBias` for each pair of tokens: integers [1 + P, 1 + P].

  Args:
    grid: rows and columns of the P patches, which stand behind the class token.
  """
  rows, columns = _distances(grid)
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing='ij'), -1).reshape(-1, 2)
  apart = places[:, None] - places[None] + np.array(grid) - 1  # [P, P, 2], from zero
  count = rows * columns
  index = np.empty((1 + len(places), 1 + len(places)), int)
  index[1:, 1:] = apart[..., 0] * columns + apart[..., 1]
  index[0] = count
  index[:, 0] = count + 1
  index[0, 0] = count + 2
  return index


class GridBias(nn.Module):
  """A learned logit for every head and distance in rows and columns: BEiT (arXiv:2106.08254).

  Tokens between the class token and the patches, such as prompts, have none.

  Attributes:
    heads: number of heads.
    grid: rows and columns of patches, which are the last tokens of a sequence.
    dtype: of the result.
    param_dtype: of the table.
  """

  heads: int
  grid: tuple[int, int]
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: int):
    """Returns the bias [1, heads, tokens, tokens] of a class token, others, and the patches.

    Raises:
      ValueError: there are fewer tokens than the class token and the patches.
    """
    rows, columns = _distances(self.grid)
    shape = (rows * columns + _SPECIAL, self.heads)
    table = self.param('embedding', nn.initializers.zeros, shape, self.param_dtype)
    index = grid_distances(self.grid)
    others = tokens - len(index)
    check_grid(self.grid, others + 1)
    if others < 0:
      raise ValueError(f'a sequence of {tokens} tokens has patches, and no class token before them')
    bias = table.astype(self.dtype)[index]  # [1 + P, 1 + P, heads]
    if others:
      bias = jnp.insert(bias, np.full(others, 1), 0, axis=0)
      bias = jnp.insert(bias, np.full(others, 1), 0, axis=1)
    return bias.transpose(2, 0, 1)[None]


def bias_of_heads(bias, heads: int, bias_heads: tuple[int, ...] | None):
  """What the heads of a block read of a bias [1, J, N, M] that all blocks share.

  Args:
    bias: a logit for each of its J heads and each pair of tokens.
    heads: number of heads of the block.
    bias_heads: for each of them the head of the bias; None for all in their order.

  Raises:
    ValueError: there are not as many as heads.
  """
  if bias_heads is None:
    return bias
  if len(bias_heads) != heads:
    raise ValueError(
      f'bias_heads={bias_heads} names {len(bias_heads)} heads of the position bias, '
      f'one for each of the {heads} heads of the block'
    )
  return bias[:, list(bias_heads)]
