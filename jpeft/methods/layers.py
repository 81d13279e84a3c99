"""Small layers as pure functions of their parameters."""

import jax
import jax.numpy as jnp


def pool(x: jax.Array, reduction: int) -> jax.Array:
  """Means over groups of `reduction` neighbouring features: [..., d] to [..., d / r]; no
  parameters.
  """
  return x.reshape(*x.shape[:-1], -1, reduction).mean(-1)


def dense(
  key, fan_in: int, fan_out: int, *lead: int, std: float | None = None
) -> dict[str, jax.Array]:
  """The parameters of a linear map, normal with std 1 / sqrt(fan_in) unless given, the bias
  zero.
  """
  kernel = jax.random.normal(key, (*lead, fan_in, fan_out)) * (fan_in**-0.5 if std is None else std)
  return {'kernel': kernel, 'bias': jnp.zeros((*lead, fan_out))}


def linear(t, x: jax.Array) -> jax.Array:
  """x [..., fan_in] through a linear map."""
  return x @ t['kernel'] + t['bias']


def scales(width: int, *lead: int) -> dict[str, jax.Array]:
  """The parameters of a LayerNorm."""
  return {'scale': jnp.ones((*lead, width)), 'shift': jnp.zeros((*lead, width))}


def layer_norm(t, x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """LayerNorm over the last axis; t may hold no scale and shift. Statistics are float32."""
  wide = x.astype(jnp.float32)
  wide = wide - wide.mean(-1, keepdims=True)
  y = (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)).astype(x.dtype)
  return y * t['scale'] + t['shift'] if t else y


def rms_norm(t, x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """RMSNorm over the last axis. Statistics are float32."""
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)).astype(x.dtype) * t[
    'scale'
  ]


def put_first(out, new: jax.Array):
  """`out` with its first array replaced, in that array's dtype."""
  first, *rest = jax.tree.leaves(out)
  return jax.tree.unflatten(jax.tree.structure(out), [new.astype(first.dtype), *rest])
