"""Which implementation a product takes, by platform, shape and dtype."""

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
OPERATION = 'coded_product'  # what traced programs call a product from codes

# The most rows of x for which a kernel is chosen. Beyond them XLA, which writes the decoded matrix
# out once, is faster: a kernel decodes again for each tile of rows, and its products are slower
# than those of a library.
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
  """The kernel with its tiles, or 'xla' where the kernel cannot do the product."""
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.float32, jnp.bfloat16):
    return Choice('xla', f'{dtype} is neither float32 nor bfloat16')
  if shape[0] % (2 * form.block):
    return Choice('xla', f'a block of {form.block} crosses the middle of {shape[0]} rows')
  tiles = [tiles for least, tiles in TILES[kernel] if rows >= least][-1]
  if kernel == 'triton':
    return _fit_triton(shape, tiles)
  return _fit_mosaic(rows, shape, dtype, tiles)


def _fit_triton(shape: tuple[int, int], tiles: tuple[int, ...]) -> Choice:
  tile_rows, most_columns, *rest = tiles
  columns = _divisor(shape[1], most_columns, 16)
  if columns is None:
    return Choice('xla', f'16 does not divide {shape[1]} columns')
  return Choice('triton', 'few rows: the codes are all that is read', (tile_rows, columns, *rest))


def _fit_mosaic(rows: int, shape: tuple[int, int], dtype, tiles: tuple[int, ...]) -> Choice:
  most_rows, most_codes, most_columns = tiles
  if dtype == jnp.float32:
    # Values take twice the bytes, and a product of full precision needs copies of them.
    most_rows = min(most_rows, 512)
    most_codes //= 2
    most_columns //= 2
  codes = _divisor(shape[0] // 2, most_codes, _LANES)
  columns = _divisor(shape[1], most_columns, _LANES)
  if codes is None or columns is None:
    return Choice('xla', f'{2 * _LANES} rows and {_LANES} columns do not both divide {list(shape)}')
  tiles = (_equal_tiles(rows, most_rows), codes, columns)
  return Choice('mosaic', 'no decoded matrix in memory, and fewer cycles', tiles)


def _divisor(size: int, most: int, least: int) -> int | None:
  """The largest power of two from `least` to `most` that divides a size; None if none does."""
  power = most
  while power >= least:
    if size % power == 0:
      return power
    power //= 2
  return None


def _equal_tiles(rows: int, most: int) -> int:
  """The rows of a tile, for as few equal tiles as possible: all rows, or a multiple of 16."""
  tiles = -(-rows // most)
  if tiles == 1:
    return rows
  return -(-rows // (16 * tiles)) * 16
