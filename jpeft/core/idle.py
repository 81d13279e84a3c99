"""Rows of large arrays that only an edit of theta reads (`Weight.idle`).

A run has such arrays in pinned host memory where the device has it: there they cost the device
nothing, and the rows that an edit reads and writes are all that moves. Elsewhere they are arrays
like any other. The compiler offloads slices, and no gathers: so rows are taken one by one.
"""

import jax


def read_row(x: jax.Array, number) -> jax.Array:
  """One row of matrices [..., c, d] that may be in host memory: [..., 1, d], on the device."""
  row = jax.lax.dynamic_slice(x, _begin(x, number), (*x.shape[:-2], 1, x.shape[-1]))
  return jax.device_put(row, jax.memory.Space.Device) if _is_in_host(x) else row


def write_row(x: jax.Array, row: jax.Array, number) -> jax.Array:
  """Matrices [..., c, d] with another row [..., 1, d], in the memory where they were."""
  if _is_in_host(x):
    row = jax.device_put(row, jax.memory.Space.Host)
  return jax.lax.dynamic_update_slice(x, row, _begin(x, number))


def _is_in_host(x: jax.Array) -> bool:
  return jax.typeof(x).memory_space == jax.memory.Space.Host


def _begin(x: jax.Array, number) -> tuple:
  return (*(0 for _ in x.shape[:-2]), number, 0)
