"""Adam whose moments are stored in 8 bits.

Dettmers et al., 2021, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). The mean m
and the root r of the mean square are decoded, moved by Adam in float32, and coded again:

  m <- b1 m + (1 - b1) g        r <- sqrt(b2 r^2 + (1 - b2) g^2)
  direction = (m / (1 - b1^t)) / (r / sqrt(1 - b2^t) + eps)

A block of numbers shares the largest size of its numbers as a scale, and each number is one of 256
values with a dynamic exponent, from 1e-7 to 1: signed for m, unsigned for r. The direction is that
of the moments before they are coded. A block never reaches over two layers of a stack, so that a
scanned model is trained as the unrolled one. An array with few numbers keeps both in float32.

Deviations. The paper codes the mean square itself. Its root, coded here, has half the range, so
that it reaches as far down as the mean does; and what is not 0 is never coded as 0. Else a number
whose square is lost while its mean is not would make a step of many times the learning rate. Blocks
have 256 numbers, as in today's bitsandbytes, where the paper has 2048. Embeddings are as others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import codes as arithmetic

BLOCK = 256
LEAST = 4096  # numbers of an array that is coded
SIGNED = arithmetic.dynamic_map()
UNSIGNED = arithmetic.dynamic_map(signed=False)


class Adam8BitState(NamedTuple):
  """State of `scale_by_adam_8bit`; trees like the parameters.

  Attributes:
    count: updates so far.
    mean: codes uint8 of m, or m in float32.
    square: codes uint8 of r, or the mean square in float32.
    mean_scale, square_scale: [*lead, blocks] of each; None in the places of float32.
  """

  count: jax.Array
  mean: Any
  square: Any
  mean_scale: Any
  square_scale: Any


def scale_by_adam_8bit(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  leading: Callable[[Any, Any], int] = lambda path, x: 0,
) -> optax.GradientTransformation:
  """Adam's direction with moments of 8 bits (arXiv 2110.02861).

  Args:
    b1, b2, eps: of Adam.
    leading: (path, array) -> how many of its first axes are layers of a stack.
  """

  def is_coded(x) -> bool:
    return x.size >= LEAST

  def init(params):
    def codes(path, x):
      return jnp.zeros(x.shape, jnp.uint8 if is_coded(x) else jnp.float32)

    def scale(path, x):
      if not is_coded(x):
        return None
      lead = x.shape[: leading(path, x)]
      count = x.size // max(1, int(np.prod(lead)))
      return jnp.zeros((*lead, -(-count // BLOCK)))

    def of_all(fn):
      return jax.tree_util.tree_map_with_path(fn, params)

    return Adam8BitState(
      jnp.zeros((), jnp.int32), of_all(codes), of_all(codes), of_all(scale), of_all(scale)
    )

  def update(updates, state, params=None):
    count = state.count + 1

    def one(g, mean, square, mean_scale, square_scale):
      g32 = g.astype(jnp.float32)
      if mean_scale is not None:
        mean = decoded(mean, mean_scale, SIGNED)
        square = decoded(square, square_scale, UNSIGNED) ** 2
      mean = b1 * mean + (1 - b1) * g32
      square = b2 * square + (1 - b2) * g32**2
      root = jnp.sqrt(square)
      direction = mean / (1 - b1**count) / (root / jnp.sqrt(1 - b2**count) + eps)
      if mean_scale is None:
        return direction.astype(g.dtype), mean, square, None, None
      lead = mean_scale.ndim - 1
      mean, mean_scale = coded(mean, SIGNED, lead)
      square, square_scale = coded(root, UNSIGNED, lead)
      return direction.astype(g.dtype), mean, square, mean_scale, square_scale

    leaves, structure = jax.tree.flatten(updates)
    given = [structure.flatten_up_to(tree) for tree in state[1:]]
    found = [one(*each) for each in zip(leaves, *given, strict=True)]
    moved, *trees = (structure.unflatten(column) for column in zip(*found, strict=True))
    return moved, Adam8BitState(count, *trees)

  return optax.GradientTransformation(init, update)


def coded(x: jax.Array, values: np.ndarray, lead: int = 0) -> tuple[jax.Array, jax.Array]:
  """(codes uint8 of the shape of x, scales [*x.shape[:lead], blocks]).

  Args:
    x: float32.
    values: the 256 that codes stand for, ascending, the largest size 1.
    lead: axes of which each place has blocks of its own.
  """
  blocks = _blocks(x, lead)
  scale = jnp.abs(blocks).max(-1)
  unit = blocks / jnp.where(scale == 0, 1, scale)[..., None]
  codes = jnp.searchsorted(jnp.asarray(arithmetic.midpoints(values)), unit)
  zero = int(np.flatnonzero(values == 0)[0])
  if zero == 0:  # of sizes: what is not 0 is at least the smallest of them
    codes = jnp.where(unit > 0, jnp.maximum(codes, 1), codes)
  return _whole(codes.astype(jnp.uint8), x.shape, lead), scale


def decoded(codes: jax.Array, scale: jax.Array, values: np.ndarray) -> jax.Array:
  """The inverse of `coded`, float32."""
  lead = scale.ndim - 1
  blocks = jnp.asarray(values)[_blocks(codes, lead)] * scale[..., None]
  return _whole(blocks, codes.shape, lead)


def _blocks(x: jax.Array, lead: int) -> jax.Array:
  """[*lead, blocks, BLOCK], the last block filled up."""
  rows = x.reshape(*x.shape[:lead], -1)
  rows = jnp.pad(rows, [(0, 0)] * lead + [(0, -rows.shape[-1] % BLOCK)])
  return rows.reshape(*x.shape[:lead], -1, BLOCK)


def _whole(blocks: jax.Array, shape: tuple[int, ...], lead: int) -> jax.Array:
  rows = blocks.reshape(*shape[:lead], -1)
  return rows[..., : int(np.prod(shape[lead:]))].reshape(shape)
