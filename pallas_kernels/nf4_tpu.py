"""x @ W and g @ W^T on TPU (Pallas Mosaic) from 4-bit codes.

Blocks of the matrix are decoded in VMEM, just before they are used. A block of the forward pass has
two rows of the matrix in each byte, one from its upper and one from its lower half; x is therefore
read as two blocks. That of the backward pass takes one of the two nibbles, since an output block
has to be one piece. All sums are float32.

x [M, K], W [K, N], g [M, N].
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
  m = x.shape[0]
  half, n = codes.shape
  tile_rows, tile_codes, tile_columns = tiles
  tiles = (min(tile_rows, m), tile_codes, tile_columns)
  table = np.zeros((8, LANES), np.float32)  # whole registers: sublanes, lanes
  table[:, :16] = values
  table = jnp.asarray(table)
  # With an axis for the steps, a block of the scales spans whole axes.
  scales = scales.reshape(2 * half // tile_codes, tile_codes // block, n)
  if transposed:
    grid, in_specs, out_spec = _backward_grid(m, half, n, tiles, block)
    kernel = _backward
    args = (x, codes, scales, table)
    width = 2 * half
  else:
    grid, in_specs, out_spec = _forward_grid(m, half, n, tiles, block)
    kernel = _forward
    args = (x, x, codes, scales, scales, table)
    width = n
  parallel = len(grid) - 1  # the last axis of the grid is summed over
  return pl.pallas_call(
    functools.partial(kernel, values=values),
    grid=grid,
    in_specs=in_specs,
    out_specs=out_spec,
    out_shape=jax.ShapeDtypeStruct((m, width), x.dtype),
    scratch_shapes=[pltpu.VMEM(out_spec.block_shape, jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * parallel + ('arbitrary',), vmem_limit_bytes=VMEM
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * m * half * n,
      transcendentals=0,
      bytes_accessed=x.dtype.itemsize * m * (2 * half + n) + codes.size + 4 * scales.size,
    ),
    interpret=interpret,
    name='nf4_matmul_transposed' if transposed else 'nf4_matmul',
  )(*args)


_TABLE = pl.BlockSpec((8, LANES), lambda *_: (0, 0))


def _forward_grid(m: int, half: int, n: int, tiles: tuple[int, int, int], block: int):
  """(grid, specs of the arguments, spec of the output) of x @ W.

  The grid: rows of x, columns of W, and rows of codes, over which is summed.
  """
  rows, codes, columns = tiles
  steps = half // codes
  scales = (1, codes // block, columns)
  in_specs = [
    pl.BlockSpec((rows, codes), lambda i, j, k: (i, k)),
    pl.BlockSpec((rows, codes), lambda i, j, k: (i, steps + k)),
    pl.BlockSpec((codes, columns), lambda i, j, k: (k, j)),
    pl.BlockSpec(scales, lambda i, j, k: (k, 0, j)),
    pl.BlockSpec(scales, lambda i, j, k: (steps + k, 0, j)),
    _TABLE,
  ]
  out_spec = pl.BlockSpec((rows, columns), lambda i, j, k: (i, j))
  return (pl.cdiv(m, rows), n // columns, steps), in_specs, out_spec


def _backward_grid(m: int, half: int, n: int, tiles: tuple[int, int, int], block: int):
  """(grid, specs of the arguments, spec of the output) of g @ W^T.

  The grid: rows of g, which half of K, rows of codes, and columns of W, over which is summed.
  """
  rows, codes, columns = tiles
  steps = half // codes
  in_specs = [
    pl.BlockSpec((rows, columns), lambda i, h, j, k: (i, k)),
    pl.BlockSpec((codes, columns), lambda i, h, j, k: (j, k)),
    pl.BlockSpec((1, codes // block, columns), lambda i, h, j, k: (h * steps + j, 0, k)),
    _TABLE,
  ]
  out_spec = pl.BlockSpec((rows, codes), lambda i, h, j, k: (i, h * steps + j))
  return (pl.cdiv(m, rows), 2, steps, n // columns), in_specs, out_spec


def _forward(low_x, high_x, codes, low_scales, high_scales, table, out, total, *, values):
  _start(2, total)
  wide = codes[...].astype(jnp.int32)
  # Half by lanes, half by selections: different units of the chip do these, at the same time.
  low = _scaled(_gather(wide & 15, table), low_scales[0])
  high = _scaled(_select(wide >> 4, values), high_scales[0])
  x = jnp.concatenate([low_x[...], high_x[...]], 1)
  w = jnp.concatenate([low, high], 0).astype(x.dtype)
  total[...] += _dot(x, w, contracted=0)
  _end(2, total, out)


def _backward(g, codes, scales, table, out, total, *, values):
  _start(3, total)
  wide = codes[...].astype(jnp.int32) >> 4 * pl.program_id(1)
  half = wide.shape[0] // 2
  # `_select` reads the lowest four bits alone.
  w = jnp.concatenate([_gather(wide[:half] & 15, table), _select(wide[half:], values)], 0)
  total[...] += _dot(g[...], _scaled(w, scales[0]).astype(g.dtype), contracted=1)
  _end(3, total, out)


def _gather(codes, table):
  """The values of codes, by a gather along the lanes."""
  found = []
  for start in range(0, codes.shape[1], LANES):
    part = codes[:, start : start + LANES]
    values = jnp.broadcast_to(table[0:1, :], part.shape)
    found.append(jnp.take_along_axis(values, part, 1))
  return jnp.concatenate(found, 1)


def _select(codes, values):
  """The values of codes, by selections."""
  return lookup(codes, np.array(values, np.float32))


def _scaled(values, scales):
  """values [rows, columns] times scales [rows / block, columns]."""
  blocks = values.reshape(scales.shape[0], -1, values.shape[1])
  return (blocks * scales[:, None]).reshape(values.shape)


def _start(axis, total):
  @pl.when(pl.program_id(axis) == 0)
  def _():
    total[...] = jnp.zeros_like(total)


def _end(axis, total, out):
  @pl.when(pl.program_id(axis) == pl.num_programs(axis) - 1)
  def _():
    out[...] = total[...].astype(out.dtype)


def _dot(a, w, contracted: int):
  """a times w, whose axis `contracted` is summed over."""
  exact, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
  precision = exact if a.dtype == jnp.float32 else default  # whatever JAX is configured for
  axes = ((1,), (contracted,))
  return jax.lax.dot_general(
    a, w, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
  )
