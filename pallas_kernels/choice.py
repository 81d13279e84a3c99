"""Which implementation a product takes: by platform, shape and dtype, with the reason and the
tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp


class Coding(NamedTuple):
  """How a matrix is coded; whatever has the two attributes can take its place.

  Attributes:
    name: of the values of the codes, a key of `codes.VALUES`.
    block: rows of a column that share a scale.
  """

  name: str = 'nf4'
  block: int = 64


NF4 = Coding()
KERNELS = {'tpu': 'mosaic', 'cuda': 'triton'}

# The most rows for which a kernel is chosen. Beyond them its decoding, which is repeated for each
# tile of rows, or its products, which are slower than those of a library, cost more than XLA's
# writing the matrix out once.
ROWS = {'mosaic': 8192, 'triton': 64}

# (from so many rows: tiles) of bfloat16. mosaic: rows, rows of codes, columns. triton: rows,
# columns, splits, warps, stages.
TILES = {
  'mosaic': ((0, (256, 1024, 512)), (257, (2048, 512, 512))),
  'triton': (
    (0, (16, 64, 8, 4, 3)),
    (17, (32, 64, 4, 4, 3)),
    (33, (64, 64, 2, 4, 3)),
    (65, (64, 64, 1, 4, 3)),
  ),
}
_LANES = 128


class Choice(NamedTuple):
  """What runs a product.

  Attributes:
    implementation: 'mosaic' (TPU), 'triton' (GPU) or 'xla'.
    reason: why, in words.
    tiles: of the kernel.
  """

  implementation: str
  reason: str
  tiles: tuple[int, ...] = ()


def choice(
  rows: int, shape: tuple[int, int], dtype=jnp.bfloat16, platform: str = 'tpu', form: Coding = NF4
) -> Choice:
  """What `nf4_matmul` runs on a platform, forwards and backwards.

  Args:
    rows: of x, all leading axes together.
    shape: [in, out] of the matrix.
    dtype: of x.
    platform: 'tpu', 'cuda', 'cpu' or another that JAX knows.
    form: how the matrix is coded.
  """
  kernel = KERNELS.get(platform)
  if kernel is None:
    return Choice('xla', f'there is no kernel for {platform}')
  found = fit(kernel, rows, shape, dtype, form)
  if found.implementation != 'xla' and rows > ROWS[kernel]:
    return Choice(
      'xla', f'{rows} rows: beyond {ROWS[kernel]} decoding once and a plain product cost less'
    )
  return found


def fit(kernel: str, rows: int, shape: tuple[int, int], dtype, form: Coding) -> Choice:
  """The kernel with its tiles, or 'xla' where the kernel cannot do it."""
  half, n, dtype = shape[0] // 2, shape[1], jnp.dtype(dtype)
  if dtype not in (jnp.float32, jnp.bfloat16):
    return Choice('xla', f'{dtype} is neither float32 nor bfloat16')
  if shape[0] % (2 * form.block):
    return Choice('xla', f'a block of {form.block} crosses the middle of {shape[0]} rows')
  tiles = [t for least, t in TILES[kernel] if rows >= least][-1]
  if kernel == 'triton':
    bm, bn, *rest = tiles
    bn = _divisor(n, bn, 16)
    if bn is None:
      return Choice('xla', f'16 does not divide {n} columns')
    return Choice(kernel, 'few rows: the codes are all that is read', (bm, bn, *rest))
  bm, bk, bn = tiles
  if dtype == jnp.float32:  # as many bytes, and copies for a product of full precision
    bm, bk, bn = min(bm, 512), bk // 2, bn // 2
  bk, bn, bm = _divisor(half, bk, _LANES), _divisor(n, bn, _LANES), _even(rows, bm)
  if bk is None or bn is None:
    return Choice('xla', f'{2 * _LANES} rows and {_LANES} columns do not both divide {list(shape)}')
  return Choice(kernel, 'no decoded matrix in memory, and fewer cycles', (bm, bk, bn))


def _divisor(size: int, most: int, least: int) -> int | None:
  """The largest power of two between two that divides a size."""
  while most >= least and size % most:
    most //= 2
  return most if most >= least else None


def _even(rows: int, most: int) -> int:
  """As few tiles as may be, of equal size: all rows, or a multiple of 16 of them."""
  tiles = -(-rows // most)
  return rows if tiles == 1 else -(-rows // (16 * tiles)) * 16
