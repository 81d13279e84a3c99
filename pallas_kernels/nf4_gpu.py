"""x @ W and g @ W^T on GPU (Pallas Triton) from 4-bit codes, for few rows, where the bytes of W are
what takes time.

A program takes one block of scales' worth of rows from both halves of W at a time. Codes become
values by a load from a table of 16, which the cache holds; scales multiply products of a block
(forward) or g (backward) rather than W, once a column instead of once an entry. What `splits`
programs found for one output is summed afterwards.
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
  m, (half, n) = x.shape[0], codes.shape
  bm, bn, splits, warps, stages = tiles
  steps = n // bn if transposed else half // block
  splits = next(s for s in range(min(splits, steps), 0, -1) if steps % s == 0)
  width = 2 * half if transposed else n
  kernel = functools.partial(
    _backward if transposed else _forward, block=block, bn=bn, steps=steps // splits
  )
  out = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(m, bm), half // block if transposed else n // bn, splits),
    in_specs=[pl.no_block_spec] * 4,
    out_specs=pl.BlockSpec((None, bm, width), lambda i, j, k: (k, i, 0)),
    out_shape=jax.ShapeDtypeStruct((splits, m, width), x.dtype if splits == 1 else jnp.float32),
    compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=interpret,
    name='nf4_matmul_transposed' if transposed else 'nf4_matmul',
  )(x, codes, scales, jnp.asarray(values, x.dtype))
  return out[0] if splits == 1 else out.sum(0).astype(x.dtype)


def _forward(x, codes, scales, table, out, *, block, bn, steps):
  rows, mask = _rows(x, out)
  columns, half = pl.ds(pl.program_id(1) * bn, bn), codes.shape[0]
  first = pl.program_id(2) * steps

  def step(t, total):
    at = (first + t) * block
    c = codes[pl.ds(at, block), columns].astype(jnp.int32)
    for shift, start in ((0, 0), (4, half)):
      w = table[c >> shift & 15]
      product = _dot(plt.load(x.at[rows, pl.ds(start + at, block)], mask=mask, other=0), w)
      total += product * scales[pl.ds(start // block + first + t, 1), columns]
    return total

  total = jax.lax.fori_loop(0, steps, step, jnp.zeros((out.shape[0], bn), jnp.float32))
  plt.store(out.at[:, columns], total.astype(out.dtype), mask=mask)


def _backward(g, codes, scales, table, out, *, block, bn, steps):
  rows, mask = _rows(g, out)
  row, first, half = pl.program_id(1), pl.program_id(2) * steps, codes.shape[0]
  at = row * block

  def step(t, totals):
    columns = pl.ds((first + t) * bn, bn)
    c = codes[pl.ds(at, block), columns].astype(jnp.int32)
    wide = plt.load(g.at[rows, columns], mask=mask, other=0).astype(jnp.float32)
    found = []
    for total, shift, start in zip(totals, (0, 4), (0, half), strict=True):
      scaled = wide * scales[pl.ds(start // block + row, 1), columns]
      found.append(total + _dot(scaled.astype(g.dtype), table[c >> shift & 15].T))
    return tuple(found)

  totals = jax.lax.fori_loop(0, steps, step, (jnp.zeros((out.shape[0], block), jnp.float32),) * 2)
  for total, start in zip(totals, (0, half), strict=True):
    plt.store(out.at[:, pl.ds(start + at, block)], total.astype(out.dtype), mask=mask)


def _rows(x, out):
  """The rows of x that a program takes, and which of them exist."""
  start, count = pl.program_id(0) * out.shape[0], out.shape[0]
  return pl.ds(start, count), (start + jnp.arange(count) < x.shape[0])[:, None]


def _dot(a, b):
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
