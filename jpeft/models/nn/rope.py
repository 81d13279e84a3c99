"""Rotary positions (RoPE, arXiv:2104.09864) on halves: feature i turns with feature i + K/2."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
  """How fast the features of a head turn.

  Attributes:
    theta: the slowest feature has a wavelength of nearly 2 pi theta positions.
    scaling: 'default'; 'linear', all slower by `factor`; or 'llama3', slow features slower by
      `factor`, fast ones as they were, those between interpolated.
    factor: of the scaling.
    low: llama3: wavelengths above original / low are slow.
    high: llama3: wavelengths below original / high are fast.
    original: llama3: the context length of the first training.
  """

  theta: float = 10000.0
  scaling: str = 'default'
  factor: float = 1.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192

  def frequencies(self, size: int) -> np.ndarray:
    """Radians a position, float32 [size / 2], for heads of an even size.

    Raises:
      ValueError: an unknown scaling, or an odd size.
    """
    if size % 2:
      raise ValueError(f'rotary positions turn pairs of features: a head size of {size} is odd')
    plain = self.theta ** (-np.arange(0, size, 2) / size)
    if self.scaling == 'default':
      return plain.astype(np.float32)
    if self.scaling == 'linear':
      return (plain / self.factor).astype(np.float32)
    if self.scaling != 'llama3':
      raise ValueError(
        f"the RoPE scaling {self.scaling!r} is not supported, only 'default', 'linear' and 'llama3'"
      )
    turns = self.original * plain / (2 * math.pi)  # full turns within the original context
    fast = np.clip((turns - self.low) / (self.high - self.low), 0, 1)  # 1: fast, 0: slow
    return (plain * (fast + (1 - fast) / self.factor)).astype(np.float32)

  def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns x [.., N, H, K] by its positions [.., N], in float32; returns the dtype of x."""
    angle = positions[..., None, None] * self.frequencies(x.shape[-1])  # [.., N, 1, K / 2]
    cos = jnp.cos(angle)
    sin = jnp.sin(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(turned, -1).astype(x.dtype)
