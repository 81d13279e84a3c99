"""The attention masks that a block is called with, in one form."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

# Parts of the names of arguments about another sequence, as of a decoder that attends to an
# encoder: `context_mask`, `cross_attention_mask`, `encoder_mask`, `memory_mask`.
_OTHER_SEQUENCE = ('context', 'cross', 'encoder', 'memory')


def is_of_other_sequence(name: str) -> bool:
  """Whether an argument of a block, by its name, is about another sequence than the block's own."""
  return any(part in name for part in _OTHER_SEQUENCE)


def mask_names(names: Iterable[str]) -> dict[str, str]:
  """Which inputs of a block are masks, and of which sequence.

  Args:
    names: the block's inputs by parameter name.

  Returns:
    {name: 'mask' for keys of the block's own sequence, 'context_mask' for those of another}.
  """
  kinds = {}
  for name in names:
    if 'mask' not in name:
      continue
    kinds[name] = 'context_mask' if is_of_other_sequence(name) else 'mask'
  return kinds


def masks(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The masks among a block's inputs: booleans [B or 1, 1 or N, M], True where a key is seen.

  Args:
    inputs: what the block is called with, by parameter name. Masks of floats are biases of logits,
      those of integers number the texts of a row (see `segment_mask`).

  Returns:
    {'mask': of the block's own sequence, 'context_mask': of another}, those that there are.
  """
  found = {}
  for name, kind in mask_names(inputs).items():
    mask = inputs[name]
    if kind == 'mask':
      mask = segment_mask(mask)
    found[kind] = _seen(mask)
  return found


def _seen(mask: jax.Array) -> jax.Array:
  """A mask as booleans [B or 1, 1 or N, M]."""
  if jnp.issubdtype(mask.dtype, jnp.floating):
    seen = mask > -1
  else:
    seen = mask != 0
  if is_per_key(seen):
    return seen[:, None]  # [B, 1, M]
  if seen.ndim == 4:
    return seen[:, 0]  # [B, heads, N, M]: the heads share one mask
  return seen.reshape((1,) * (3 - seen.ndim) + seen.shape)


def is_per_key(mask: jax.Array) -> bool:
  """Whether a mask is [B, M], one entry a key; a square one is taken for a map [N, M] of tokens."""
  return mask.ndim == 2 and mask.shape[0] != mask.shape[1]


def segment_mask(mask: jax.Array) -> jax.Array:
  """The attention mask of rows that several texts are packed into.

  Args:
    mask: integers [B, N] that number the texts of a row from 1 on, 0 for padding. Any other mask is
      returned as it is.

  Returns:
    Booleans [B, 1, N, N]: a token sees those of its own text, and padding all texts.
  """
  if mask.ndim != 2 or not jnp.issubdtype(mask.dtype, jnp.integer):
    return mask
  queries = mask[:, None, :, None]
  keys = mask[:, None, None, :]
  # A row of the softmax must have some key, so that padding sees all texts.
  return (keys != 0) & ((queries == keys) | (queries == 0))


def seen_keys(mask: jax.Array, count: int) -> jax.Array:
  """Entries [.., count] of a mask or additive bias [.., M], for more keys that every query sees."""
  value = 1
  if jnp.issubdtype(mask.dtype, jnp.floating):
    value = 0  # it is added to logits
  return jnp.full((*mask.shape[:-1], count), value, mask.dtype)


def additive(mask: jax.Array, dtype) -> jax.Array:
  """A mask as a bias of attention logits [B or 1, 1, 1 or N, M]; one of floats already is one."""
  if not jnp.issubdtype(mask.dtype, jnp.floating):
    # Half the least number, so that the sum of two biases is finite.
    mask = jnp.where(mask != 0, 0.0, jnp.finfo(dtype).min / 2)
  if is_per_key(mask):
    mask = mask[:, None, None]
  return mask.astype(dtype).reshape((1,) * (4 - mask.ndim) + mask.shape)
