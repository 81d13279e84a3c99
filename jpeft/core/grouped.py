"""The product of tiles of rows with a stack of matrices, one matrix a tile: experts.

Axes: G tiles, T rows of a tile, E matrices, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def grouped_dot(x: jax.Array, w: jax.Array, groups: jax.Array) -> jax.Array:
  """x[g] @ w[groups[g]] of every tile g, one tile after the other.

  `jax.lax.ragged_dot` is the same product; XLA for TPU computes it as one of all rows with all
  matrices, E times the FLOPs, where this one computes each row once.

  Args:
    x: [G, T, I].
    w: [E, I, O].
    groups: integers [G]: which matrix each tile is multiplied by.

  Returns:
    An array [G, T, O].
  """

  def tile(of_tile):
    rows, group = of_tile
    return rows @ jax.lax.dynamic_index_in_dim(w, group, keepdims=False)

  return jax.lax.map(tile, (x, groups))


def _forward(x, w, groups):
  return grouped_dot(x, w, groups), (x, w, groups)


def _backward(kept, cotangent):
  x, w, groups = kept
  return _of_rows(cotangent, w, groups), _of_matrices(x, cotangent, w, groups), None


def _of_rows(cotangent, w, groups):
  """The gradient of the rows, [G, T, I]."""

  def tile(of_tile):
    rows, group = of_tile
    return rows @ jax.lax.dynamic_index_in_dim(w, group, keepdims=False).T

  return jax.lax.map(tile, (cotangent, groups))


def _of_matrices(x, cotangent, w, groups):
  """The gradient of the matrices, [E, I, O], in float32 until all tiles are added.

  JAX would transpose the loop to one that adds a whole stack a tile; this adds one matrix.
  """

  def add(total, of_tile):
    rows, change, group = of_tile
    one = jnp.einsum('ti,to->io', rows, change, preferred_element_type=jnp.float32)
    before = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, before + one, group, 0), None

  total, _ = jax.lax.scan(add, jnp.zeros(w.shape, jnp.float32), (x, cotangent, groups))
  return total.astype(w.dtype)


grouped_dot.defvjp(_forward, _backward)
