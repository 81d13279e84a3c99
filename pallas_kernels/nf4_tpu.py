"""x @ W and g @ W^T on TPU from 4-bit codes: blocks of the matrix are decoded in VMEM, just before
they are used.

A block of the forward pass holds two rows of the matrix in each byte, one from its upper and one
from its lower half; x is therefore read as two blocks. That of the backward pass takes one of the
two nibbles, since an output block has to be one piece. All sums are float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .codes import lookup

LANES = 128
VMEM = 48 * 2**20  # of the 64 MiB or more that a core has


def matmul(x, codes, scales, *, values, block, tiles, transposed=False, interpret=False):
  """x @ W, or x @ W^T if `transposed`, in the dtype of x.

  Args:
    x: [M, K]; transposed [M, N].
    codes: uint8 [K / 2, N].
    scales: float32 [K / block, N].
    values: what the 16 codes stand for.
    block: rows of W that share a scale.
    tiles: (rows of x, rows of codes, columns) a step; they divide K / 2 and N, and 128 divides
      them.
    transposed: contract N rather than K.
    interpret: run on any platform, slowly.
  """
  m, (half, n) = x.shape[0], codes.shape
  bm, bk, bn = tiles
  bm = min(bm, m)
  table = np.zeros((8, LANES), np.float32)
  table[:, :16] = values
  scales = scales.reshape(2 * half // bk, bk // block, n)  # a block of it then spans whole axes
  fixed, steps = pl.BlockSpec((8, LANES), lambda *_: (0, 0)), half // bk
  if transposed:
    # One after the other: rows of x, which half of K, rows of codes, columns of W, over which is
    # summed.
    grid = (pl.cdiv(m, bm), 2, steps, n // bn)
    specs = [
      pl.BlockSpec((bm, bn), lambda i, h, j, k: (i, k)),
      pl.BlockSpec((bk, bn), lambda i, h, j, k: (j, k)),
      pl.BlockSpec((1, bk // block, bn), lambda i, h, j, k: (h * steps + j, 0, k)),
      fixed,
    ]
    out, spec = (m, 2 * half), pl.BlockSpec((bm, bk), lambda i, h, j, k: (i, h * steps + j))
    kernel, args = _backward, (x, codes, scales, jnp.asarray(table))
  else:
    grid = (pl.cdiv(m, bm), n // bn, steps)
    specs = [
      pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
      pl.BlockSpec((bm, bk), lambda i, j, k: (i, steps + k)),
      pl.BlockSpec((bk, bn), lambda i, j, k: (k, j)),
      pl.BlockSpec((1, bk // block, bn), lambda i, j, k: (k, 0, j)),
      pl.BlockSpec((1, bk // block, bn), lambda i, j, k: (steps + k, 0, j)),
      fixed,
    ]
    out, spec = (m, n), pl.BlockSpec((bm, bn), lambda i, j, k: (i, j))
    kernel, args = _forward, (x, x, codes, scales, scales, jnp.asarray(table))
  size = x.dtype.itemsize
  return pl.pallas_call(
    functools.partial(kernel, values=values),
    grid=grid,
    in_specs=specs,
    out_specs=spec,
    out_shape=jax.ShapeDtypeStruct(out, x.dtype),
    scratch_shapes=[pltpu.VMEM(spec.block_shape, jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * (len(grid) - 1) + ('arbitrary',), vmem_limit_bytes=VMEM
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * m * half * n,
      transcendentals=0,
      bytes_accessed=size * m * (2 * half + n) + codes.size + 4 * scales.size,
    ),
    interpret=interpret,
    name='nf4_matmul_transposed' if transposed else 'nf4_matmul',
  )(*args)


def _forward(low_x, high_x, codes, low_scales, high_scales, table, out, total, *, values):
  _start(2, total)
  c = codes[...].astype(jnp.int32)
  # Half by lanes, half by selections: different units of the chip do these, at the same time.
  low = _scaled(_gather(c & 15, table), low_scales[0])
  high = _scaled(_select(c >> 4, values), high_scales[0])
  x = jnp.concatenate([low_x[...], high_x[...]], 1)
  total[...] += _dot(x, jnp.concatenate([low, high], 0).astype(x.dtype), 0)
  _end(2, total, out)


def _backward(g, codes, scales, table, out, total, *, values):
  _start(3, total)
  c = codes[...].astype(jnp.int32) >> 4 * pl.program_id(1)
  half = c.shape[0] // 2
  w = jnp.concatenate([_gather(c[:half] & 15, table), _select(c[half:], values)], 0)
  total[...] += _dot(g[...], _scaled(w, scales[0]).astype(g.dtype), 1)
  _end(3, total, out)


def _gather(codes, table):
  parts = [codes[:, at : at + LANES] for at in range(0, codes.shape[1], LANES)]
  return jnp.concatenate(
    [jnp.take_along_axis(jnp.broadcast_to(table[0:1, :], c.shape), c, 1) for c in parts], 1
  )


def _select(codes, values):
  return lookup(codes, np.array(values, np.float32))


def _scaled(values, scales):
  return (values.reshape(scales.shape[0], -1, values.shape[1]) * scales[:, None]).reshape(
    values.shape
  )


def _start(axis, total):
  @pl.when(pl.program_id(axis) == 0)
  def _():
    total[...] = jnp.zeros_like(total)


def _end(axis, total, out):
  @pl.when(pl.program_id(axis) == pl.num_programs(axis) - 1)
  def _():
    out[...] = total[...].astype(out.dtype)


def _dot(a, w, axis):
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a, w, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )
