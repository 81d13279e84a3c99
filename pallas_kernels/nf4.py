"""x @ W from 4-bit codes, with a backward pass that decodes again."""

import functools

import jax
import jax.numpy as jnp

from . import nf4_gpu, nf4_tpu
from .choice import KERNELS, NF4, Coding, choice, fit
from .codes import VALUES, decode

_RUN = {'mosaic': nf4_tpu.matmul, 'triton': nf4_gpu.matmul}


def nf4_matmul(
  x: jax.Array,
  codes: jax.Array,
  absmax: jax.Array,
  *,
  form: Coding = NF4,
  implementation: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x @ W for a W in 4 bits, laid out as a box of `jpeft.quant` holds it; differentiable in x.

  The backward pass keeps codes and scales alone: g @ W^T decodes them again, once the cotangent is
    there. W is
  constant: absmax gets no gradient. A float32 x is multiplied in full precision, bfloat16 is summed
    in float32.

  Args:
    x: [..., in], float32 or bfloat16.
    codes: uint8 [in / 2, out], the first half of `in` in the low nibbles.
    absmax: the scales, float32 [in / block, out] (of double-quantized ones, what `Format.scales`
      gives).
    form: the format; NF4 in blocks of 64 by default.
    implementation: 'mosaic', 'triton' or 'xla'; by default what `choice` says of the platform that
      the program is compiled for. Kernels are not partitioned by XLA: on several devices call them
      inside of shard_map.
    interpret: run a named kernel on any platform, slowly.

  Returns:
    [..., out], of the dtype of x.

  Raises:
    ValueError: the shapes do not fit each other, or not the named implementation.
  """
  shape = x.shape[-1], absmax.shape[-1]
  if (
    codes.ndim != 2
    or codes.shape != (shape[0] / 2, shape[1])
    or absmax.shape != (shape[0] / form.block, shape[1])
  ):
    raise ValueError(
      f'codes {list(codes.shape)} and scales {list(absmax.shape)} are not of a matrix with '
      f'{shape[0]} rows in blocks of {form.block}'
    )
  if implementation not in (None, 'xla', *_RUN):
    raise ValueError(
      f'no implementation is called {implementation!r}; there are {", ".join(_RUN)} and xla'
    )
  return _matmul(x, codes, absmax, Coding(form.name, form.block), implementation, interpret)


def reference(
  x: jax.Array, codes: jax.Array, absmax: jax.Array, form: Coding = NF4, transposed: bool = False
) -> jax.Array:
  """The same by plain operations: W is decoded, then multiplied; x @ W^T if `transposed`."""
  scales = absmax.astype(jnp.float32)
  w = decode(codes, scales, VALUES[form.name], form.block).astype(x.dtype)
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, w, (((x.ndim - 1,), (int(transposed),)), ((), ())), precision=precision
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _matmul(x, codes, absmax, form, implementation, interpret):
  return _product(x, codes, absmax, form, implementation, interpret, False)


def _forward(x, codes, absmax, *how):
  return _matmul(x, codes, absmax, *how), (codes, absmax)


def _backward(form, implementation, interpret, kept, g):
  # Tied to the cotangent, lest XLA decodes early, or keeps what the forward pass decoded.
  kept, g = jax.lax.optimization_barrier((kept, g))
  return _product(g, *kept, form, implementation, interpret, True), None, None


_matmul.defvjp(_forward, _backward)


def _product(x, codes, absmax, form, implementation, interpret, transposed):
  rows, shape = x.size // x.shape[-1], (2 * codes.shape[0], codes.shape[1])

  def run(chosen):
    def kernel(x, codes, absmax):
      y = _RUN[chosen.implementation](
        x.reshape(rows, x.shape[-1]),
        codes,
        absmax.astype(jnp.float32),
        values=tuple(map(float, VALUES[form.name])),
        block=form.block,
        tiles=chosen.tiles,
        transposed=transposed,
        interpret=interpret,
      )
      return y.reshape(*x.shape[:-1], -1)

    return kernel

  plain = functools.partial(reference, form=form, transposed=transposed)
  if implementation == 'xla':
    return plain(x, codes, absmax)
  if implementation:
    chosen = fit(implementation, rows, shape, x.dtype, form)
    if chosen.implementation == 'xla':
      raise ValueError(f'{implementation} cannot do this product: {chosen.reason}')
    return run(chosen)(x, codes, absmax)
  chosen = {platform: choice(rows, shape, x.dtype, platform, form) for platform in KERNELS}
  kernels = {platform: run(c) for platform, c in chosen.items() if c.implementation != 'xla'}
  return jax.lax.platform_dependent(x, codes, absmax, default=plain, **kernels)
