"""The attention masks that a block is called with, in one form."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import Bound

# Parts of the names of arguments about another sequence, as of a decoder that attends to an
# encoder: `context_mask`, `cross_attention_mask`, `encoder_mask`, `memory_mask`.
_OTHER_SEQUENCE = ('context', 'cross', 'encoder', 'memory')


def is_of_other_sequence(name: str) -> bool:
  """Whether an argument of a block, by its name, is about another sequence than the block's own."""
  return any(part in name for part in _OTHER_SEQUENCE)


def reads_other_sequence(inputs: Mapping[str, Any]) -> bool:
  """Whether a block is called with another sequence beside its stream.

  Args:
    inputs: what the block is called with, arrays or shapes by parameter name, the stream first.
  """
  for name, x in list(inputs.items())[1:]:
    is_other_kind = any(part in name for part in ('mask', 'bias', 'position'))
    if name == 'context' or (len(x.shape) == 3 and not is_other_kind):
      return True
  return False


def mask_names(inputs: Mapping[str, Any]) -> dict[str, str]:
  """Which inputs of a block are attention masks, and of which sequence.

  An array [heads] that is called a mask masks heads. A mask of another sequence is one by its name,
  in a block that reads another sequence: `encoder_mask` of an encoder's own block masks its tokens.

  Args:
    inputs: what the block is called with, arrays or shapes by parameter name, the stream first.

  Returns:
    {name: 'mask' for keys of the block's own sequence, 'context_mask' for those of another}.
  """
  has_other = reads_other_sequence(inputs)
  kinds = {}
  for name, x in list(inputs.items())[1:]:
    if 'mask' not in name or len(x.shape) < 2:
      continue
    kinds[name] = 'context_mask' if has_other and is_of_other_sequence(name) else 'mask'
  return kinds


def conditions(call: Bound, args, kwargs) -> list[str]:
  """The names of masks of floats that a module selects by, such as `flax.linen.make_causal_mask`.

  They are ones and zeros; those that it adds to its logits are biases.

  Args:
    call: of the module.
    args, kwargs: its arguments.
  """
  found = []
  for name, x in call.inputs(*args, **kwargs).items():
    is_mask = 'mask' in name and x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
    if is_mask and not call.adds(name, args, kwargs):
      found.append(name)
  return found


def masks(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The masks among a block's inputs: booleans [B or 1, 1 or N, M], True where a key is seen.

  Args:
    inputs: what the block is called with, by parameter name, the stream first. Masks of floats are
      biases of logits (see `conditions`), those of integers number the texts of a row (see
      `segment_mask`).

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


def numbers_texts(mask: jax.Array) -> bool:
  """Whether a mask is integers [B, N] that number the texts of a row from 1 on, 0 for padding."""
  return mask.ndim == 2 and bool(jnp.issubdtype(mask.dtype, jnp.integer))


def segment_mask(mask: jax.Array) -> jax.Array:
  """The attention mask of rows that several texts are packed into.

  Args:
    mask: integers [B, N] that number the texts of a row from 1 on, 0 for padding. Any other mask is
      returned as it is.

  Returns:
    Booleans [B, 1, N, N]: a token sees those of its own text, and padding all texts.
  """
  if not numbers_texts(mask):
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


def additive(mask: jax.Array, dtype, batch: int) -> jax.Array:
  """A mask as a bias of attention logits [B or 1, heads or 1, 1 or N, M]; one of floats is one.

  Of three axes the first is that of the examples, if it is as long, else that of the heads.
  """
  if not jnp.issubdtype(mask.dtype, jnp.floating):
    # Half the least number, so that the sum of two biases is finite.
    mask = jnp.where(mask != 0, 0.0, jnp.finfo(dtype).min / 2)
  if is_per_key(mask):
    mask = mask[:, None, None]
  if mask.ndim == 3 and len(mask) == batch:
    mask = mask[:, None]
  return mask.astype(dtype).reshape((1,) * (4 - mask.ndim) + mask.shape)


def has_length(x: jax.Array, batch: int, length: int) -> bool:
  """Whether an array has an axis of tokens: of this length, and not the axis of examples."""
  if length in x.shape[1:]:
    return True
  return x.shape[:1] == (length,) and length != batch
