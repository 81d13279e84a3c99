"""Attention functions with keys and values that are not those of the sequence.

With rows K', V' [m, J, K] in front of the keys and values [B, M, J, K] of a sequence,

  out = attention(q, [K'; K], [V'; V]) = (1 - l) attention(q, K, V) + l attention(q, K', V'),

l being the share of the softmax that falls on the rows.

Axes: B batch, N queries, M keys, H query heads, J key and value heads, K head size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import TokenMask

from .masks import seen_keys

# The arguments of an attention function behind query, key and value, by position.
_ARGUMENTS = (
  'bias',
  'mask',
  'broadcast_dropout',
  'dropout_rng',
  'dropout_rate',
  'deterministic',
  'dtype',
)
# What would silently mean something else with more keys.
_COUNTS_KEYS = ('key_value_seq_lengths', 'local_window_size')


def named_options(args: tuple, kwargs: dict) -> dict[str, Any]:
  """The arguments of an attention function behind query, key and value, by name."""
  return {**kwargs, **dict(zip(_ARGUMENTS, args, strict=False))}


def more_keys(attention_fn: Callable, keys: jax.Array, values: jax.Array) -> Callable:
  """An attention function with further keys and values in front, which every query sees.

  Masks and biases are widened: True, one, or zero where they are added to the logits. A causal
  attention stays causal in the tokens.

  Args:
    attention_fn: (query [B, N, H, K], key and value [B, M, J, K], bias=None, mask=None, ...) ->
      [B, N, H, K], as `flax.linen.dot_product_attention`.
    keys, values: [m, J, K], for all examples alike, or [B, m, J, K]. They come in as they are:
      behind any rotation by position.

  Returns:
    A function of the same arguments. It raises a ValueError for arguments that count keys, and for
    rows that do not fit.
  """

  def attend(query, key, value, *args, is_causal: bool = False, **kwargs):
    *batch, length, _, _ = key.shape
    options = named_options(args, kwargs)
    rows_of_keys = _rows(keys, key, 'keys')
    rows_of_values = _rows(values, value, 'values')
    count = rows_of_keys.shape[-3]
    if rows_of_values.shape[-3] != count:
      raise ValueError(f'{count} more keys and {rows_of_values.shape[-3]} more values')
    for name in _COUNTS_KEYS:
      if options.get(name) is not None:
        raise ValueError(f'{name} counts keys, and there are {count} more: use a mask instead')
    if is_causal:  # a mask instead: the function itself would count the rows among the tokens
      options['mask'] = _causal(query.shape[-3], length, options.get('mask'))
    for name in ('bias', 'mask'):
      mask = options.get(name)
      # An axis of one entry is for all keys, and broadcasts over the rows too.
      if isinstance(mask, TokenMask):
        options[name] = mask.with_more(count)
      elif mask is not None and mask.shape[-1] == length:
        options[name] = jnp.concatenate([seen_keys(mask, count), mask], -1)
    key = jnp.concatenate([rows_of_keys, key], -3)
    value = jnp.concatenate([rows_of_values, value], -3)
    return attention_fn(query, key, value, **options)

  return attend


def _rows(rows: jax.Array, like: jax.Array, what: str) -> jax.Array:
  """Rows [.., m, J, K] beside keys or values [B, M, J, K], for every example."""
  if rows.ndim < 3 or rows.shape[-2:] != like.shape[-2:]:
    raise ValueError(
      f'more {what} are [m, *{list(like.shape[-2:])}], heads and head size last, and these are '
      f'{list(rows.shape)}'
    )
  return jnp.broadcast_to(rows, (*like.shape[:-3], *rows.shape[-3:])).astype(like.dtype)


def _causal(queries: int, keys: int, mask: jax.Array | None) -> jax.Array:
  """A causal mask [1, 1, queries, keys], and what another mask hides."""
  seen = jnp.tril(jnp.ones((1, 1, queries, keys), bool))
  if mask is None:
    return seen
  return seen & mask
