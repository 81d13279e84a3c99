"""Operations whose backward pass stores four bits a value, or none: for backbones that take them.

The forward pass is the plain operation, bit for bit; only what is stored for the backward pass
differs. Each takes any shape, in float32 or bfloat16, and is differentiable once, in reverse.

- gelu, gelu_tanh, quick_gelu, silu: the 16-way code of the derivative (few-bit backward, arXiv
  2202.00441), exactly ceil(n / 2) bytes of n elements; relu: one bit, exact.
- softmax: the output as codes of its square root, which follow small probabilities more closely
  than even steps do, and the largest probability a row.
- layer_norm, rms_norm: the normalised input in 4-bit groups of 64, and 1 / std a row.
- shared_layer_norm, shared_rms_norm: exact; they store the output that the next layer stores anyway
  (memory-sharing norms, arXiv 2406.16282) once `fold` has moved scale and shift into that layer.
- attention: exact; stores query, key and value, and computes the probabilities again. Fits
  `attention_fn` of Linen and NNX attention layers.

The codes are tied to the cotangent by a barrier. In unrolled layers XLA would otherwise unpack them
early, or recognise what they were made from and keep that.
"""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp

from .codes import bits_of, decode, derivative_codes, encode, look_up, pack, unpack
from .derivatives import QUICK, Table, table


def tied(residuals, cotangent):
  """Both; no residual is used, unpacked or recomputed before the cotangent is there."""
  return jax.lax.optimization_barrier((residuals, cotangent))


def coded(fn, table: Table):
  """An elementwise function whose backward pass stores codes of its derivative.

  Args:
    fn: array -> array of the same shape and dtype.
    table: of its derivative.
  """
  bits = bits_of(table)

  def forward(x):
    return fn(x), pack(derivative_codes(x, table), bits)

  def backward(packed, g):
    packed, g = tied(packed, g)
    slope = look_up(unpack(packed, g.shape, bits), table.levels)
    return ((slope * g.astype(jnp.float32)).astype(g.dtype),)

  op = jax.custom_vjp(fn)
  op.defvjp(forward, backward)
  return op


PLAIN = {
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(QUICK * x),
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}


# Scores of a head, from which on whole ones are told.
_LONG = 2**20


# On first use, not on import: solving for a table takes a fifth of a second.
@functools.cache
def _coded(name: str):
  return coded(PLAIN[name], table(name))


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x)."""
  return _coded('gelu')(x)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by tanh."""
  return _coded('gelu_tanh')(x)


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x)."""
  return _coded('quick_gelu')(x)


def silu(x: jax.Array) -> jax.Array:
  """x sigmoid(x)."""
  return _coded('silu')(x)


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0); one bit a value, exact."""
  return _coded('relu')(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(x: jax.Array, axis: int = -1) -> jax.Array:
  """Probabilities along an axis."""
  return jax.nn.softmax(x, axis)


def _softmax_forward(x, axis):
  y = jax.nn.softmax(x, axis)
  top = y.max(axis, keepdims=True).astype(jnp.float32)
  # Even steps of the root are fine steps of small probabilities; the largest is exact.
  root = jnp.sqrt(y.astype(jnp.float32) / top)
  return y, (pack(jnp.round(15 * root)), top)


def _softmax_backward(axis, residuals, g):
  (packed, top), g = tied(residuals, g)
  root = unpack(packed, g.shape).astype(jnp.float32) / 15
  y = top * jnp.square(root)
  wide = g.astype(jnp.float32)
  d_x = y * (wide - (wide * y).sum(axis, keepdims=True))
  return (d_x.astype(g.dtype),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def _standardised(x, eps: float, centred: bool):
  """((x - mean) / std, 1 / std) over the last axis, in float32; without the mean if not centred."""
  x = x.astype(jnp.float32)
  if centred:
    x = x - x.mean(-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
  return x * scale, scale


def _through_norm(normal, scale, g, centred: bool):
  """The cotangent of x, from the cotangent g of the normalised x."""
  d_x = g - normal * (g * normal).mean(-1, keepdims=True)
  if centred:
    d_x = d_x - g.mean(-1, keepdims=True)
  return scale * d_x


def _affine(normal, gain, shift, dtype):
  y = normal * gain.astype(jnp.float32)
  if shift is not None:
    y = y + shift.astype(jnp.float32)
  return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(x, gain, shift, eps, centred):
  normal, _ = _standardised(x, eps, centred)
  return _affine(normal, gain, shift, x.dtype)


def _norm_forward(x, gain, shift, eps, centred):
  normal, scale = _standardised(x, eps, centred)
  return _affine(normal, gain, shift, x.dtype), (encode(normal), scale, gain, shift)


def _norm_backward(eps, centred, residuals, g):
  (grouped, scale, gain, shift), g = tied(residuals, g)
  normal = decode(grouped, g.shape, jnp.float32)
  wide = g.astype(jnp.float32)
  d_x = _through_norm(normal, scale, wide * gain.astype(jnp.float32), centred)
  rows = tuple(range(g.ndim - 1))  # all axes but the features
  d_gain = (wide * normal).sum(rows)
  d_shift = None
  if shift is not None:
    d_shift = wide.sum(rows).astype(shift.dtype)
  return d_x.astype(g.dtype), d_gain.astype(gain.dtype), d_shift


_norm.defvjp(_norm_forward, _norm_backward)


def layer_norm(
  x: jax.Array, scale: jax.Array, shift: jax.Array | None = None, eps: float = 1e-6
) -> jax.Array:
  """LayerNorm over the last axis of x [.., D]; scale and shift are [D]."""
  return _norm(x, scale, shift, eps, True)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float = 1e-6) -> jax.Array:
  """RMSNorm over the last axis of x [.., D]; scale is [D]."""
  return _norm(x, scale, None, eps, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _shared_norm(x, eps, centred):
  normal, _ = _standardised(x, eps, centred)
  return normal.astype(x.dtype)


def _shared_forward(x, eps, centred):
  normal, scale = _standardised(x, eps, centred)
  # The residual is the output itself, not a copy in float32: it is stored once for both layers.
  normal = normal.astype(x.dtype)
  return normal, (normal, scale)


def _shared_backward(eps, centred, residuals, g):
  (normal, scale), g = tied(residuals, g)
  d_x = _through_norm(normal.astype(jnp.float32), scale, g.astype(jnp.float32), centred)
  return (d_x.astype(g.dtype),)


_shared_norm.defvjp(_shared_forward, _shared_backward)


def shared_layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """(x - mean) / std over the last axis; the only wide residual is the output."""
  return _shared_norm(x, eps, True)


def shared_rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / rms over the last axis; the only wide residual is the output."""
  return _shared_norm(x, eps, False)


def fold(
  scale: jax.Array, shift: jax.Array | None, kernel: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
  """(kernel, bias) of a layer that reads the normalised x as the given one reads scale * x + shift.

  Args:
    scale, shift: [D], of the norm.
    kernel: [D, O].
    bias: [O], or None for none.
  """
  scaled = scale[:, None] * kernel
  if shift is None:
    return scaled, bias
  moved = shift @ kernel
  if bias is not None:
    moved = moved + bias
  return scaled, moved


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *args, **kwargs) -> jax.Array:
  """Dot-product attention that stores query, key and value alone for its backward pass.

  Scores [.., H, N, M] are whole while they are read. Where they are large a warning names
  `jpeft.dot_product_attention`, which stores as little and makes some rows of them at a time.

  Args:
    query: [.., N, H, K].
    key, value: [.., M, H, K].
    *args, **kwargs: as of `flax.linen.dot_product_attention`.

  Raises:
    ValueError: logits are to have a soft cap, as those of Gemma 2 do.
  """
  if kwargs.pop('logit_cap', None) is not None:
    raise ValueError(
      'residuals.attention has no logit_cap, which this model needs: take '
      'jpeft.dot_product_attention, which caps logits and stores as little'
    )
  length, keys = query.shape[-3], key.shape[-3]
  if length * keys >= _LONG:
    warnings.warn(
      f'residuals.attention makes scores of {length:,} x {keys:,} tokens whole: take '
      'jpeft.dot_product_attention, which stores as little and makes some rows of them at a time',
      stacklevel=2,
    )

  @jax.checkpoint
  def attend(query, key, value):
    return nn.dot_product_attention(query, key, value, *args, **kwargs)

  return attend(query, key, value)
