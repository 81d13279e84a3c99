"""x @ W from 4-bit codes, with a backward pass that decodes again."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import nf4_gpu, nf4_tpu
from .choice import NF4, Choice, Coding, choice, fit
from .codes import VALUES, decode
from .spread import multiply

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
      that the program is compiled for. On several devices see `spread`.
    interpret: run a named kernel on any platform, slowly.

  Returns:
    [..., out], of the dtype of x.

  Raises:
    ValueError: the format has no table of values, or the shapes do not fit each other, or not the
      named implementation.
  """
  product = _checked(x, codes, absmax, form, implementation, interpret, False)
  return _matmul(x, codes, absmax.astype(jnp.float32), product)


def nf4_product(
  x: jax.Array,
  codes: jax.Array,
  absmax: jax.Array,
  *,
  transposed: bool = False,
  form: Coding = NF4,
  implementation: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """`nf4_matmul` with the derivative that JAX forms; x @ W^T if `transposed`.

  For a caller that says itself what the backward pass keeps.
  """
  product = _checked(x, codes, absmax, form, implementation, interpret, transposed)
  return multiply(product, x, codes, absmax.astype(jnp.float32))


def _checked(x, codes, absmax, form, implementation, interpret, transposed) -> '_Product':
  """The product as a value; see `nf4_matmul` for what it raises."""
  _values(form)  # refused here, whatever implementation is chosen
  fan_in, fan_out = x.shape[-1], absmax.shape[-1]
  side = f'{fan_in} rows'
  if transposed:
    fan_in, fan_out = form.block * absmax.shape[0], x.shape[-1]
    side = f'{fan_out} columns'
  codes_fit = codes.ndim == 2 and codes.shape == (fan_in / 2, fan_out)
  if not codes_fit or absmax.shape != (fan_in / form.block, fan_out):
    raise ValueError(
      f'codes {list(codes.shape)} and scales {list(absmax.shape)} are not of a matrix with '
      f'{side} in blocks of {form.block}'
    )
  if implementation not in (None, 'xla', *_KERNEL):
    raise ValueError(
      f'no implementation is called {implementation!r}; there are {", ".join(_KERNEL)} and xla'
    )
  coding = Coding(form.name, form.block)
  if implementation in _KERNEL:
    _fitted(implementation, x.size // x.shape[-1], (fan_in, fan_out), x.dtype, coding)
  return _Product(coding, implementation, interpret, transposed)


def _fitted(kernel: str, rows: int, shape: tuple[int, int], dtype, form: Coding) -> Choice:
  """A named kernel with its tiles.

  Raises:
    ValueError: it cannot do the product.
  """
  chosen = fit(kernel, rows, shape, dtype, form)
  if chosen.implementation == 'xla':
    raise ValueError(f'{kernel} cannot do this product: {chosen.reason}')
  return chosen


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


class _Product(NamedTuple):
  """A `spread.Product`; for the other fields see `nf4_matmul`."""

  form: Coding
  implementation: str | None
  interpret: bool
  transposed: bool

  def turned(self):
    """See `spread.Product`."""
    return self._replace(transposed=not self.transposed)

  def plain(self, x, codes, scales):
    """See `spread.Product`."""
    return reference(x, codes, scales, self.form, self.transposed)

  def on_device(self, platform, x, codes, scales):
    """See `spread.Product`."""
    rows = x.size // x.shape[-1]
    shape = (2 * codes.shape[0], codes.shape[1])  # [in, out]
    if self.implementation in _KERNEL:
      chosen = _fitted(self.implementation, rows, shape, x.dtype, self.form)
    elif self.implementation is None and platform is not None:
      chosen = choice(rows, shape, x.dtype, platform, self.form)
    else:
      return self.plain(x, codes, scales)
    if chosen.implementation == 'xla':
      return self.plain(x, codes, scales)
    return _by_kernel(
      x,
      codes,
      scales,
      chosen=chosen,
      form=self.form,
      transposed=self.transposed,
      interpret=self.interpret,
    )

  def of_many(self, x, codes, scales):
    """See `spread.Product`."""
    return self.on_device(None, x, codes, scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, codes, scales, product: _Product):
  return multiply(product, x, codes, scales)


def _forward(x, codes, scales, product: _Product):
  return _matmul(x, codes, scales, product), (codes, scales)


def _backward(product: _Product, residuals, g):
  # Without this dependence on the cotangent XLA may decode early, or store what the forward pass
  # decoded.
  (codes, scales), g = jax.lax.optimization_barrier((residuals, g))
  return multiply(product.turned(), g, codes, scales), None, None


_matmul.defvjp(_forward, _backward)


def _by_kernel(x, codes, scales, *, chosen: Choice, form: Coding, transposed, interpret):
  y = _KERNEL[chosen.implementation](
    x.reshape(x.size // x.shape[-1], x.shape[-1]),
    codes,
    scales,
    values=tuple(map(float, _values(form))),
    block=form.block,
    tiles=chosen.tiles,
    transposed=transposed,
    interpret=interpret,
  )
  return y.reshape(*x.shape[:-1], -1)
