"""What several methods share."""

import jax


def drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
  """x with a share `rate` of its numbers set to zero and the others scaled up; x itself without a
  key.
  """
  if key is None or not rate:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return x * (kept / (1 - rate or 1)).astype(
    x.dtype
  )  # at rate 1 nothing is kept: no division by zero


def on_first(out, fn):
  """A module's output, fn applied to its first array."""
  leaves, tree = jax.tree.flatten(out)
  return jax.tree.unflatten(tree, [fn(leaves[0]), *leaves[1:]])
