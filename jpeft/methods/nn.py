"""Small layers as pure functions of their parameters, and other functions that methods share.

A function that draws parameters (`dense`, `conv`, `scales`) returns a dictionary of arrays, and the
function that uses them (`linear`, `convolve`, `layer_norm`) takes that dictionary as `t`. `stack`
are leading axes, for the parameters of several layers in one array.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import Site

# Initial distributions


def truncated_normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Normal numbers between -2 and 2."""
  return jax.random.truncated_normal(key, -2, 2, shape)


def uniform(key: jax.Array, shape: Sequence[int], bound: float) -> jax.Array:
  """Uniform numbers between -bound and bound."""
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def glorot_bound(fan_in: int, fan_out: int) -> float:
  """The bound of Glorot's uniform distribution."""
  return math.sqrt(6 / (fan_in + fan_out))


# Linear maps and convolutions


def dense(
  key: jax.Array,
  fan_in: int,
  fan_out: int,
  *stack: int,
  std: float | None = None,
  draw: Callable[..., jax.Array] = jax.random.normal,
) -> dict[str, jax.Array]:
  """The parameters of a linear map, the bias zero.

  Args:
    key: random key.
    fan_in: width of the input.
    fan_out: width of the output.
    *stack: leading axes.
    std: factor of the kernel's numbers; None for 1 / sqrt(fan_in).
    draw: (key, shape) -> the kernel's numbers before they are scaled.
  """
  if std is None:
    std = fan_in**-0.5
  kernel = std * draw(key, (*stack, fan_in, fan_out))
  return {'kernel': kernel, 'bias': jnp.zeros((*stack, fan_out))}


def glorot(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
  """The parameters of a linear map, uniform after Glorot, the bias zero."""
  kernel = uniform(key, (fan_in, fan_out), glorot_bound(fan_in, fan_out))
  return {'kernel': kernel, 'bias': jnp.zeros(fan_out)}


def linear(t, x: jax.Array) -> jax.Array:
  """x [..., fan_in] through a linear map."""
  return x @ t['kernel'] + t['bias']


def due_at_once(t, x: jax.Array) -> tuple[Any, jax.Array]:
  """(t, x), whose gradients are both computed before the one of x goes on.

  For a layer behind a long scan: XLA may put off the gradient of its parameters until the backward
  pass of the scan is over, and keep what it is made of all that time.

  Args:
    t: the layer's parameters.
    x: its input.
  """
  return jax.lax.optimization_barrier((t, x))


def conv(
  key: jax.Array,
  size: Sequence[int],
  fan_in: int,
  fan_out: int,
  *stack: int,
  std: float | None = None,
  bias: bool = True,
) -> dict[str, jax.Array]:
  """The parameters of a convolution, kernel [*stack, *size, fan_in, fan_out], the bias zero.

  Args:
    key: random key.
    size: of the kernel, one number for each axis of space or time.
    fan_in: channels of the input.
    fan_out: channels of the output.
    *stack: leading axes.
    std: of the kernel; None for 1 / sqrt(fan_in times the size).
    bias: whether there is one.
  """
  if std is None:
    std = (math.prod(size) * fan_in) ** -0.5
  t = {'kernel': std * jax.random.normal(key, (*stack, *size, fan_in, fan_out))}
  if bias:
    t['bias'] = jnp.zeros((*stack, fan_out))
  return t


def convolve(
  t,
  x: jax.Array,
  strides: int | Sequence[int] = 1,
  padding: str | int | Sequence[int] = 'SAME',
) -> jax.Array:
  """x through a convolution over all axes but the first and the last.

  Args:
    t: the parameters.
    x: [B, *space, fan_in], one to three axes of space or time.
    strides: one number, or one for each axis.
    padding: 'SAME', 'VALID', or how many zeros stand at both ends of every axis, or of each axis.
  """
  axes = x.ndim - 2
  if isinstance(strides, int):
    strides = (strides,) * axes
  if isinstance(padding, int):
    padding = (padding,) * axes
  if not isinstance(padding, str):
    padding = [(zeros, zeros) for zeros in padding]
  space = 'DHW'[-axes:]
  layout = f'N{space}C'
  y = jax.lax.conv_general_dilated(
    x,
    t['kernel'].astype(x.dtype),
    strides,
    padding,
    dimension_numbers=(layout, f'{space}IO', layout),
  )
  if 'bias' in t:
    y = y + t['bias']
  return y


# Norms


def scales(width: int, *stack: int) -> dict[str, jax.Array]:
  """The parameters of a LayerNorm."""
  return {'scale': jnp.ones((*stack, width)), 'shift': jnp.zeros((*stack, width))}


def layer_norm(t, x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """LayerNorm over the last axis, without scale and shift where t is empty.

  Statistics are float32, the result has the dtype of x.
  """
  wide = x.astype(jnp.float32)
  centred = wide - wide.mean(-1, keepdims=True)
  y = _divide_by_root_mean_square(centred, eps).astype(x.dtype)
  if not t:
    return y
  return y * t['scale'] + t['shift']


def rms_norm(t, x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """RMSNorm over the last axis. Statistics are float32."""
  y = _divide_by_root_mean_square(x.astype(jnp.float32), eps).astype(x.dtype)
  return y * t['scale']


def _divide_by_root_mean_square(x: jax.Array, eps: float) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


# Attention


def attend(
  t,
  queries: jax.Array,
  keys: jax.Array,
  heads: int,
  values: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Attention from one sequence to another, with projections.

  Args:
    t: the linear maps 'q', 'k', 'v' and 'o'.
    queries: [B, N, C].
    keys: [B, M, C].
    heads: how many.
    values: [B, M, C]; None for the keys.
    mask: booleans [B, M], whether a key is seen; None for all.
  """
  if values is None:
    values = keys

  def project(name, x):
    return rearrange(linear(t[name], x), 'b n (h c) -> b n h c', h=heads)

  query = project('q', queries)
  key = project('k', keys)
  value = project('v', values)
  if mask is not None:
    mask = mask[:, None, None]  # [B, heads, N, M]
  y = jax.nn.dot_product_attention(query, key, value, mask=mask)
  return linear(t['o'], rearrange(y, 'b n h c -> b n (h c)'))


# Without parameters


def pool(x: jax.Array, reduction: int) -> jax.Array:
  """Means over groups of `reduction` neighbouring features: [..., d] to [..., d / r]."""
  return rearrange(x, '... (d r) -> ... d r', r=reduction).mean(-1)


def drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
  """Dropout: a share `rate` of x set to zero, the rest scaled up; x itself without a key.

  Entries are multiplied by zero, so that one of inf or nan becomes nan, where Flax writes zero.
  At rate 1 nothing of x is read, and all is zero.
  """
  return _drop(x, key, rate, x.shape)


def drop_path(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
  """Dropout of whole examples: x [B, ...] is zero for a share `rate` of them."""
  return _drop(x, key, rate, (len(x),) + (1,) * (x.ndim - 1))


def _drop(x: jax.Array, key: jax.Array | None, rate: float, shape: tuple[int, ...]) -> jax.Array:
  if key is None or not rate:
    return x
  if rate == 1:  # 0 / 0 otherwise
    return jnp.zeros_like(x)
  kept = jax.random.bernoulli(key, 1 - rate, shape)
  return x * (kept / (1 - rate)).astype(x.dtype)


# Outputs of modules, and recomputation


def put_stream(site: Site, out: Any, new: jax.Array) -> Any:
  """The output of the module at a site with another stream, in the dtype of the old one."""
  return site.map_stream(out, lambda old: new.astype(old.dtype))


def remat_if(remat: bool, fn: Callable[..., Any], **options) -> Callable[..., Any]:
  """fn, recomputed in the backward pass if `remat`; `options` are those of `jax.checkpoint`."""
  if not remat:
    return fn
  return jax.checkpoint(fn, **options)
