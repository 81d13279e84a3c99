"""A matrix to NF4 codes."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .codes import NF4, encode_nf4, midpoints

_TILES = (256, 512)  # rows of codes, columns


def quantize_nf4(
  w: jax.Array, *, block: int = 64, implementation: str | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """(codes, absmax) of a matrix, bit for bit those of `jpeft.quant.nf4(block).encode`, which is the
  plain form.

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
  if implementation == 'mosaic':
    return kernel(w)
  if implementation == 'xla' or tiles is None:
    return encode_nf4(w, block)
  return jax.lax.platform_dependent(
    w, tpu=kernel, default=functools.partial(encode_nf4, block=block)
  )


def tiles_of(shape: tuple[int, int], block: int) -> tuple[int, int] | None:
  """(rows of codes, columns) of a step, or None where the kernel cannot do it."""
  divisors = [
    next((s for s in (512, 256, 128) if s <= most and size % s == 0), None)
    for size, most in zip((shape[0] // 2, shape[1]), _TILES, strict=True)
  ]
  return None if None in divisors or divisors[0] % block else tuple(divisors)


def _mosaic(w, *, block, tiles, interpret):
  (k, n), (bk, bn) = w.shape, tiles
  steps, scales = k // 2 // bk, jax.ShapeDtypeStruct((k // 2 // bk, bk // block, n), jnp.float32)
  at = lambda start: lambda i, j: (start + i, j)
  scale = pl.BlockSpec((1, bk // block, bn), lambda i, j: (i, 0, j))
  codes, low, high = pl.pallas_call(
    functools.partial(_kernel, block=block),
    grid=(steps, n // bn),
    in_specs=[pl.BlockSpec(tiles, at(0)), pl.BlockSpec(tiles, at(steps))],
    out_specs=[pl.BlockSpec(tiles, at(0)), scale, scale],
    out_shape=[jax.ShapeDtypeStruct((k // 2, n), jnp.uint8), scales, scales],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
    interpret=interpret,
    name='quantize_nf4',
  )(w, w)
  return codes, jnp.concatenate([low, high]).reshape(k // block, n)


def _kernel(low, high, codes, low_absmax, high_absmax, *, block):
  parts = []
  for w, absmax in ((low, low_absmax), (high, high_absmax)):
    blocks = w[...].astype(jnp.float32).reshape(-1, block, w.shape[1])
    most = jnp.max(jnp.abs(blocks), 1)
    x = (blocks * jnp.where(most == 0, 0, 1 / most)[:, None]).reshape(w.shape)
    absmax[0] = most
    parts.append(sum((x > float(t)).astype(jnp.int32) for t in midpoints(NF4)))
  codes[...] = (parts[0] | parts[1] << 4).astype(jnp.uint8)
