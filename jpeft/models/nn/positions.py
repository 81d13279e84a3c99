"""Positions: tables of ViTs resized for other images, and the relative positions of T5."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange


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
  patches = table[:, first:].astype(np.float64)
  patches = rearrange(patches, '1 (i j) d -> i j d', i=old[0], j=old[1])
  rows = _bicubic(old[0], new[0])  # [new rows, old rows]
  columns = _bicubic(old[1], new[1])  # [new columns, old columns]
  patches = np.einsum('ri,cj,ijd->rcd', rows, columns, patches, optimize=True)
  patches = rearrange(patches, 'r c d -> 1 (r c) d').astype(table.dtype)
  return np.concatenate([table[:, :first], patches], 1)


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
