"""x @ W from 4-bit codes, with a backward pass that decodes again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import nf4_gpu, nf4_tpu
from .choice import KERNELS, NF4, Choice, Coding, choice, fit
from .codes import VALUES, decode

_KERNEL = {'mosaic': nf4_tpu.matmul, 'triton': nf4_gpu.matmul}


def nf4_matmul(
  x: jax.Array,
  codes: jax.Array,
  absmax: jax.Array,
  *,
  form: Coding = NF4,
  implementation: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x @ W for a W in 4 bits, with the layout of a box of `jpeft.quant`; differentiable in x.

  The backward pass stores codes and scales alone: g @ W^T decodes them again, once the cotangent
  is there. W is constant: absmax gets no gradient. A float32 x is multiplied in full precision,
  bfloat16 is summed in float32.

  Args:
    x: [..., in], float32 or bfloat16.
    codes: uint8 [in / 2, out], the first half of `in` in the low nibbles.
    absmax: the scales, float32 [in / block, out] (of double-quantized ones, what `Format.scales`
      gives).
    form: a `Coding`, or a format of `jpeft.quant`; NF4 in blocks of 64 by default.
    implementation: 'mosaic', 'triton' or 'xla'; by default what `choice` returns for the platform
      that the program is compiled for. Kernels are not partitioned by XLA: on several devices call
      them inside of shard_map.
    interpret: run a named kernel on any platform, slowly.

  Returns:
    [..., out], of the dtype of x.

  Raises:
    ValueError: the format has no table of values, or the shapes do not fit each other, or not the
      named implementation.
  """
  _values(form)  # refused here, whatever implementation is chosen
  fan_in = x.shape[-1]
  fan_out = absmax.shape[-1]
  codes_fit = codes.ndim == 2 and codes.shape == (fan_in / 2, fan_out)
  if not codes_fit or absmax.shape != (fan_in / form.block, fan_out):
    raise ValueError(
      f'codes {list(codes.shape)} and scales {list(absmax.shape)} are not of a matrix with '
      f'{fan_in} rows in blocks of {form.block}'
    )
  if implementation not in (None, 'xla', *_KERNEL):
    raise ValueError(
      f'no implementation is called {implementation!r}; there are {", ".join(_KERNEL)} and xla'
    )
  return _matmul(x, codes, absmax, Coding(form.name, form.block), implementation, interpret)


def _values(form: Coding) -> np.ndarray:
  """The values of the 16 codes of a format.

  Raises:
    ValueError: a weight of the format is not a scale times one of 16 values.
  """
  if form.name not in VALUES:
    raise ValueError(
      f'there is no product from the codes of the format {form.name!r}, which has no table of 16 '
      f'values, as {", ".join(VALUES)} have: multiply by form.decode(arrays, shape) instead'
    )
  return VALUES[form.name]


def reference(
  x: jax.Array, codes: jax.Array, absmax: jax.Array, form: Coding = NF4, transposed: bool = False
) -> jax.Array:
  """The same by plain operations: W is decoded, then multiplied; x @ W^T if `transposed`."""
  scales = absmax.astype(jnp.float32)
  w = decode(codes, scales, _values(form), form.block).astype(x.dtype)
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  contracted = ((x.ndim - 1,), (int(transposed),))
  return jax.lax.dot_general(x, w, (contracted, ((), ())), precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _matmul(x, codes, absmax, form, implementation, interpret):
  return _product(x, codes, absmax, form, implementation, interpret, False)


def _forward(x, codes, absmax, *static):
  return _matmul(x, codes, absmax, *static), (codes, absmax)


def _backward(form, implementation, interpret, residuals, g):
  # Without this dependence on the cotangent XLA may decode early, or store what the forward pass
  # decoded.
  (codes, absmax), g = jax.lax.optimization_barrier((residuals, g))
  return _product(g, codes, absmax, form, implementation, interpret, True), None, None


_matmul.defvjp(_forward, _backward)


def _product(x, codes, absmax, form, implementation, interpret, transposed):
  rows = x.size // x.shape[-1]
  shape = (2 * codes.shape[0], codes.shape[1])  # [in, out]
  plain = functools.partial(reference, form=form, transposed=transposed)
  kernel = functools.partial(_by_kernel, form=form, transposed=transposed, interpret=interpret)
  if implementation == 'xla':
    return plain(x, codes, absmax)
  if implementation is not None:
    chosen = fit(implementation, rows, shape, x.dtype, form)
    if chosen.implementation == 'xla':
      raise ValueError(f'{implementation} cannot do this product: {chosen.reason}')
    return kernel(x, codes, absmax, chosen=chosen)
  kernels = {}
  for platform in KERNELS:
    chosen = choice(rows, shape, x.dtype, platform, form)
    if chosen.implementation != 'xla':
      kernels[platform] = functools.partial(kernel, chosen=chosen)
  return jax.lax.platform_dependent(x, codes, absmax, default=plain, **kernels)


def _by_kernel(x, codes, absmax, *, chosen: Choice, form: Coding, transposed, interpret):
  y = _KERNEL[chosen.implementation](
    x.reshape(x.size // x.shape[-1], x.shape[-1]),
    codes,
    absmax.astype(jnp.float32),
    values=tuple(map(float, _values(form))),
    block=form.block,
    tiles=chosen.tiles,
    transposed=transposed,
    interpret=interpret,
  )
  return y.reshape(*x.shape[:-1], -1)
