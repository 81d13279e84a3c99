"""x @ W and g @ W^T on GPU (Pallas Triton) from 4-bit codes.

For few rows, where reading W takes most of the time. A program takes one block of rows from both
halves of W at a time. Codes become values by a load from a table of 16, which the cache holds.
Scales multiply the product of a block (forward) or g (backward) rather than W: once a column
instead of once an entry. Where `splits` programs sum parts of one output, their results are added
afterwards.

x [M, K], W [K, N], g [M, N].
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


def matmul(x, codes, scales, *, values, block, tiles, transposed=False, interpret=False):
  """As `nf4_tpu.matmul`, for any number of rows.

  Args:
    tiles: (rows of x, columns, splits) of a program, then its warps and stages. Rows and columns
      are powers of two from 16, and the columns divide N; of what is summed over, as many splits
      are made as divide it.
  """
  m = x.shape[0]
  half, n = codes.shape
  rows, columns, most_splits, warps, stages = tiles
  if transposed:
    kernel = _backward
    width = 2 * half
    pieces = half // block  # of the output, one program each
    steps = n // columns  # of the sum
  else:
    kernel = _forward
    width = n
    pieces = n // columns
    steps = half // block
  splits = _splits(steps, most_splits)
  out_dtype = x.dtype if splits == 1 else jnp.float32
  out = pl.pallas_call(
    functools.partial(kernel, block=block, tile_columns=columns, steps=steps // splits),
    grid=(pl.cdiv(m, rows), pieces, splits),
    in_specs=[pl.no_block_spec] * 4,
    out_specs=pl.BlockSpec((None, rows, width), lambda i, j, k: (k, i, 0)),
    out_shape=jax.ShapeDtypeStruct((splits, m, width), out_dtype),
    compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=interpret,
    name='nf4_matmul_transposed' if transposed else 'nf4_matmul',
  )(x, codes, scales, jnp.asarray(values, x.dtype))
  if splits == 1:
    return out[0]
  return out.sum(0).astype(x.dtype)


def _splits(steps: int, most: int) -> int:
  """The largest number up to `most` that divides the steps."""
  return next(count for count in range(min(most, steps), 0, -1) if steps % count == 0)


def _forward(x, codes, scales, table, out, *, block, tile_columns, steps):
  rows, mask = _rows(x, out)
  columns = pl.ds(pl.program_id(1) * tile_columns, tile_columns)
  half = codes.shape[0]
  first = pl.program_id(2) * steps

  def step(t, total):
    start = (first + t) * block
    packed = codes[pl.ds(start, block), columns].astype(jnp.int32)
    for shift, half_start in ((0, 0), (4, half)):
      w = table[packed >> shift & 15]
      part = plt.load(x.at[rows, pl.ds(half_start + start, block)], mask=mask, other=0)
      scale = scales[pl.ds(half_start // block + first + t, 1), columns]
      total += _dot(part, w) * scale
    return total

  zeros = jnp.zeros((out.shape[0], tile_columns), jnp.float32)
  total = jax.lax.fori_loop(0, steps, step, zeros)
  plt.store(out.at[:, columns], total.astype(out.dtype), mask=mask)


def _backward(g, codes, scales, table, out, *, block, tile_columns, steps):
  rows, mask = _rows(g, out)
  half = codes.shape[0]
  row = pl.program_id(1)  # of blocks
  start = row * block
  first = pl.program_id(2) * steps
  halves = ((0, 0), (4, half))  # (shift of the nibble, first row)

  def step(t, totals):
    columns = pl.ds((first + t) * tile_columns, tile_columns)
    packed = codes[pl.ds(start, block), columns].astype(jnp.int32)
    wide = plt.load(g.at[rows, columns], mask=mask, other=0).astype(jnp.float32)
    added = []
    for total, (shift, half_start) in zip(totals, halves, strict=True):
      scaled = wide * scales[pl.ds(half_start // block + row, 1), columns]
      added.append(total + _dot(scaled.astype(g.dtype), table[packed >> shift & 15].T))
    return tuple(added)

  zeros = jnp.zeros((out.shape[0], block), jnp.float32)
  totals = jax.lax.fori_loop(0, steps, step, (zeros, zeros))
  for total, (_, half_start) in zip(totals, halves, strict=True):
    columns = pl.ds(half_start + start, block)
    plt.store(out.at[:, columns], total.astype(out.dtype), mask=mask)


def _rows(x, out):
  """(the rows of x that a program takes, which of them exist [rows, 1])."""
  count = out.shape[0]
  start = pl.program_id(0) * count
  mask = (start + jnp.arange(count) < x.shape[0])[:, None]
  return pl.ds(start, count), mask


def _dot(a, b):
  exact, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
  precision = exact if a.dtype == jnp.float32 else default  # whatever JAX is configured for
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
