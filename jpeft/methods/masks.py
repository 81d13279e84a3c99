"""Attention masks in the forms that models use."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_ELSEWHERE = ('context', 'cross', 'encoder', 'memory')  # in the names of masks of another sequence


def masks(inputs: dict[str, jax.Array], taken: Sequence[str] = ()) -> dict[str, jax.Array]:
  """Of what a block is called with, the masks: {'mask' or 'context_mask': numbers [B or 1, 1 or N,
  M]}.

  A key that is seen has 1, another 0. Floats are additive masks already.
  """
  found = {}
  for name, mask in inputs.items():
    if 'mask' in name:
      mask = mask if any(word in name for word in _ELSEWHERE) else apart(mask)
      seen = mask > -1 if jnp.issubdtype(mask.dtype, jnp.floating) else mask != 0
      seen = seen[:, None] if seen.ndim == 2 and seen.shape[0] != seen.shape[1] else seen
      seen = seen[:, 0] if seen.ndim == 4 else seen.reshape((1,) * (3 - seen.ndim) + seen.shape)
      found['context_mask' if any(word in name for word in _ELSEWHERE) else 'mask'] = seen
  return found


def apart(mask: jax.Array) -> jax.Array:
  """A mask of integers [B, N] numbers the texts of a row, 0 being padding: as booleans [B, 1, N,
  N], where a token sees those of its own text, and padding all texts. Any other mask as it is."""
  if mask.ndim != 2 or not jnp.issubdtype(mask.dtype, jnp.integer):
    return mask
  queries, keys = mask[:, None, :, None], mask[:, None, None]
  return (keys != 0) & ((queries == keys) | (queries == 0))
