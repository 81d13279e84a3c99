"""A matrix to NF4 codes."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .codes import NF4, encode_nf4, midpoints, normalized

_MOST_CODES = 256  # rows of codes a step
_MOST_COLUMNS = 512


def quantize_nf4(
  w: jax.Array, *, block: int = 64, implementation: str | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """(codes, absmax) of a matrix, bit for bit those of the plain `codes.encode_nf4`.

  Args:
    w: [in, out], float32 or bfloat16; `block` divides in.
    block: weights of a column that share a scale.
    implementation: 'xla' or 'mosaic'; by default the kernel on a TPU, where the shape fits it: a
      fifth of the cycles, and nothing in memory but the result (docs/kernels.md).
    interpret: run the named kernel on any platform, slowly.

  Returns:
    (codes uint8 [in / 2, out], absmax float32 [in / block, out]), as `nf4_matmul` takes them.

  Raises:
    ValueError: the shape does not fit.
  """
  if w.shape[0] % block:
    raise ValueError(f'blocks of {block} do not divide {w.shape[0]} rows')
  if implementation not in (None, 'mosaic', 'xla'):
    raise ValueError(f'no implementation is called {implementation!r}; there are mosaic and xla')
  tiles = tiles_of(w.shape, block)
  if implementation == 'mosaic' and tiles is None:
    raise ValueError(
      f'mosaic cannot quantize {list(w.shape)}: 256 rows and 128 columns do not both divide it'
    )
  kernel = functools.partial(_mosaic, block=block, tiles=tiles, interpret=interpret)
  plain = functools.partial(encode_nf4, block=block)
  if implementation == 'mosaic':
    return kernel(w)
  if implementation == 'xla' or tiles is None:
    return plain(w)
  return jax.lax.platform_dependent(w, tpu=kernel, default=plain)


def tiles_of(shape: tuple[int, int], block: int) -> tuple[int, int] | None:
  """(rows of codes, columns) of a step, or None where the kernel cannot do it."""
  codes = _divisor(shape[0] // 2, _MOST_CODES)
  columns = _divisor(shape[1], _MOST_COLUMNS)
  if codes is None or columns is None or codes % block:
    return None
  return codes, columns


def _divisor(size: int, most: int) -> int | None:
  for power in (512, 256, 128):
    if power <= most and size % power == 0:
      return power
  return None


def _mosaic(w, *, block, tiles, interpret):
  k, n = w.shape
  tile_codes, tile_columns = tiles
  steps = k // 2 // tile_codes
  absmax = jax.ShapeDtypeStruct((steps, tile_codes // block, n), jnp.float32)  # of one half
  absmax_spec = pl.BlockSpec((1, tile_codes // block, tile_columns), lambda i, j: (i, 0, j))
  low_spec = pl.BlockSpec(tiles, lambda i, j: (i, j))
  high_spec = pl.BlockSpec(tiles, lambda i, j: (steps + i, j))
  codes, low_absmax, high_absmax = pl.pallas_call(
    functools.partial(_kernel, block=block),
    grid=(steps, n // tile_columns),
    in_specs=[low_spec, high_spec],
    out_specs=[low_spec, absmax_spec, absmax_spec],
    out_shape=[jax.ShapeDtypeStruct((k // 2, n), jnp.uint8), absmax, absmax],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
    interpret=interpret,
    name='quantize_nf4',
  )(w, w)
  return codes, jnp.concatenate([low_absmax, high_absmax]).reshape(k // block, n)


def _kernel(low, high, codes, low_absmax, high_absmax, *, block):
  parts = []
  for w, absmax_out in ((low, low_absmax), (high, high_absmax)):
    blocks = w[...].astype(jnp.float32).reshape(-1, block, w.shape[1])
    scaled, absmax_out[0] = normalized(blocks)
    x = scaled.reshape(w.shape)
    # The kernel counts in int32, where `rank` counts in bytes.
    parts.append(sum((x > float(border)).astype(jnp.int32) for border in midpoints(NF4)))
  codes[...] = (parts[0] | parts[1] << 4).astype(jnp.uint8)
