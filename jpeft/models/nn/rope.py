"""Rotary positions (RoPE, arXiv:2104.09864) on halves: feature i turns with feature i + K/2.

Axes: N tokens, H heads, K head size, P patches.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
  """How fast the features of a head turn.

  Attributes:
    theta: the slowest feature has a wavelength of nearly 2 pi theta positions.
    scaling: 'default'; 'linear', all slower by `factor`; 'llama3' and 'yarn' (arXiv:2309.00071),
      slow features slower by `factor`, fast ones as they were, those between interpolated: by their
      frequencies in 'llama3', by their numbers in 'yarn'; or 'longrope' (arXiv:2402.13753), each
      slower by a factor of its own.
    factor: of the scaling.
    low: llama3, yarn: features that turn less often than this in the original context are slow.
    high: llama3, yarn: features that turn more often than this are fast.
    original: llama3, yarn, longrope: the context length of the first training.
    magnitude: yarn, longrope: what turns of queries and keys is multiplied by it.
    whole: yarn: whether the first and last feature between slow and fast are whole numbers.
    part: the share of the features of a head that turn, from the first; the others stay.
    short: longrope: the factors of each pair of features in rows of up to `original` tokens.
    long: longrope: the same in longer rows.
  """

  theta: float = 10000.0
  scaling: str = 'default'
  factor: float = 1.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192
  magnitude: float = 1.0
  whole: bool = True
  part: float = 1.0
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()

  def frequencies(self, size: int, room: int = 0) -> np.ndarray:
    """Radians a position, float32 [size / 2].

    Args:
      size: features that turn, an even number.
      room: see `rotate`.

    Raises:
      ValueError: an unknown scaling, an odd size, or factors of another number of features.
    """
    if size % 2:
      raise ValueError(f'rotary positions turn pairs of features: a head size of {size} is odd')
    plain = self.theta ** (-np.arange(0, size, 2) / size)
    if self.scaling == 'default':
      return plain.astype(np.float32)
    if self.scaling == 'linear':
      return (plain / self.factor).astype(np.float32)
    if self.scaling == 'longrope':
      factors = self.long if room > self.original else self.short
      if len(factors) != size // 2:
        raise ValueError(
          f'longrope has {len(factors)} factors, and {size // 2} pairs of features turn'
        )
      return (plain / np.asarray(factors)).astype(np.float32)
    if self.scaling == 'llama3':
      turns = self.original * plain / (2 * math.pi)  # full turns within the original context
      fast = np.clip((turns - self.low) / (self.high - self.low), 0, 1)  # 1: fast, 0: slow
    elif self.scaling == 'yarn':
      fast = self._fast_by_number(size)
    else:
      raise ValueError(
        f'the RoPE scaling {self.scaling!r} is not supported, only '
        "'default', 'linear', 'llama3', 'yarn' and 'longrope'"
      )
    return (plain * (fast + (1 - fast) / self.factor)).astype(np.float32)

  def _fast_by_number(self, size: int) -> np.ndarray:
    """How fast each feature of a head is, from 0 (slow) to 1 (fast), [size / 2]: YaRN."""

    def number(turns: float) -> float:
      """The feature, counted from 0, that turns so often within the original context."""
      wavelength = self.original / (turns * 2 * math.pi)
      return size * math.log(wavelength) / (2 * math.log(self.theta))

    first = number(self.high)
    last = number(self.low)
    if self.whole:
      first = math.floor(first)
      last = math.ceil(last)
    first = max(first, 0)
    last = min(last, size - 1)
    if first == last:
      last += 0.001
    return 1 - np.clip((np.arange(size // 2) - first) / (last - first), 0, 1)

  def rotate(self, x: jax.Array, positions: jax.Array, room: int = 0) -> jax.Array:
    """Turns x [.., N, H, K] by its positions [.., N], in float32; returns the dtype of x.

    Args:
      x: queries or keys.
      positions: integers.
      room: how many tokens a row has, those that a cache has room for included. By that longrope
        chooses its factors, so that keys in a cache never turn again. For whole rows it is the
        choice of transformers, which in generation turns to the long factors on the way.
    """
    size = int(x.shape[-1] * self.part)
    angle = positions[..., None, None] * self.frequencies(size, room)  # [.., N, 1, size / 2]
    cos, sin = jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude
    if size == x.shape[-1]:
      return _turned(x, cos, sin)
    return jnp.concatenate([_turned(x[..., :size], cos, sin), x[..., size:]], -1)


class RowRope(NamedTuple):
  """Rotary positions of all tokens of a row, counted from its first.

  In rows of several texts the distances within each text are the same, and no other turns up.

  Attributes:
    rope: how fast the features turn.
  """

  rope: Rope

  def rotate(self, x: jax.Array) -> jax.Array:
    """Turns x [.., N, H, K], in float32; returns the dtype of x."""
    return self.rope.rotate(x, jnp.arange(x.shape[-3]))


class GridRope(NamedTuple):
  """Rotary positions of the patches of an image (DINOv3, arXiv:2508.10104).

  One quarter of the features turns with the row of a patch, the next with its column, and each of
  them with the feature K/2 behind it. Rows and columns are counted from -1 to 1 over the image,
  whatever its size. Tokens before the patches (class, registers, prompts) do not turn.

  Attributes:
    grid: rows and columns of patches, which are the last tokens of a sequence.
    theta: the slowest feature has a period of nearly theta half images, the fastest of one.
  """

  grid: tuple[int, int]
  theta: float = 100.0

  def angles(self, size: int) -> np.ndarray:
    """Radians of each patch, [P, size / 2], for heads of a size.

    Raises:
      ValueError: the size is no multiple of four.
    """
    if size % 4:
      raise ValueError(
        f'rotary positions of rows and columns turn a quarter of the features each: a head size of '
        f'{size} is no multiple of 4'
      )
    frequencies = self.theta ** (-np.arange(0, size, 4) / size)  # [size / 4]
    centres = [2 * (np.arange(n) + 0.5) / n - 1 for n in self.grid]
    places = np.stack(np.meshgrid(*centres, indexing='ij'), -1).reshape(-1, 2)  # [P, 2]
    angles = 2 * math.pi * places[:, :, None] * frequencies
    return angles.reshape(len(places), -1)

  def rotate(self, x: jax.Array) -> jax.Array:
    """Turns the patches of x [.., N, H, K], in float32; returns the dtype of x.

    Raises:
      ValueError: there are fewer tokens than patches, or heads have another size than a multiple of
        four.
    """
    angles = self.angles(x.shape[-1])[:, None]  # [P, 1, K / 2]
    first = x.shape[-3] - len(angles)
    check_grid(self.grid, first)
    patches = _turned(x[..., first:, :, :], np.cos(angles), np.sin(angles))
    return jnp.concatenate([x[..., :first, :, :], patches], -3)


def check_grid(grid: tuple[int, int], first: int) -> None:
  """Raises a ValueError if a sequence lacks patches: if fewer than no tokens stand before them."""
  if first < 0:
    rows, columns = grid
    raise ValueError(
      f'this block knows the positions of {rows} x {columns} patches, and its sequence of '
      f'{rows * columns + first} tokens has not all of them: a method that runs tokens of its own '
      'through a block, as vqt does, needs a model whose positions are added to its tokens alone'
    )


def _turned(x: jax.Array, cos, sin) -> jax.Array:
  """x [.., K] with feature i turned against feature i + K/2, in float32; returns the dtype of x."""
  left, right = jnp.split(x.astype(jnp.float32), 2, -1)
  turned = [left * cos - right * sin, right * cos + left * sin]
  return jnp.concatenate(turned, -1).astype(x.dtype)
