"""Dot-product attention, also of fewer key and value heads than query heads, and of long contexts.

Axes: B batch, N queries, M keys, H query heads, J key and value heads, K head size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from .device_heads import by_devices
from .token_mask import TokenMask

# Queries times keys of one example, from which on scores are never whole.
LONG = 2**20
# Scores that are there at a time, at most: all examples, the query heads of one key head.
MOST_SCORES = 2**24


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(logits / cap): nearly the same where small, and never beyond the cap (Gemma 2)."""
  return cap * jnp.tanh(logits / cap)


def dot_product_attention(query, key, value, bias=None, mask=None, **options) -> jax.Array:
  """`nn.dot_product_attention`, with as many or fewer key and value heads than query heads.

  In long contexts (see LONG) it computes some rows of scores at a time, and computes them again in
  the backward pass: it keeps none, and has derivatives in reverse alone. The numbers are the same,
  but for those that dropout draws. On a mesh it may run on each device, see `heads_over`.

  Args:
    query: [B, N, H, K].
    key, value: [B, M, J, K]; J divides H.
    bias: added to the logits, broadcastable to [B, H, N, M].
    mask: boolean, broadcastable to [B, H, N, M], or a `TokenMask`; False hides a key.
    **options: as `nn.dot_product_attention` takes them; and logit_cap, the `soft_cap` of the logits
      before bias and mask, None for none.

  Returns:
    An array [B, N, H, K].
  """
  if query.ndim == 4 and is_long(query.shape[1], key.shape[1]):
    return by_devices(by_rows, query, key, value, bias, mask, **options)
  if mask is not None:
    mask = jnp.asarray(mask)
  if key.shape[-2] == query.shape[-2]:
    return _capped_attention(query, key, value, bias, mask, **options)
  return grouped_attention(query, key, value, bias, mask, **options)


def _capped_attention(query, key, value, bias, mask, *, logit_cap=None, **options) -> jax.Array:
  """`nn.dot_product_attention`, whose logits may have a soft cap before bias and mask."""
  if logit_cap is None:
    return nn.dot_product_attention(query, key, value, bias, mask, **options)
  # Flax takes both products or none; these two are its own, so that nothing else changes.
  plain = functools.partial(
    jnp.einsum,
    precision=options.pop('precision', None),
    _dot_general=options.pop('einsum_dot_general', None) or jax.lax.dot_general,
  )

  def logits(spec, query, key):
    return soft_cap(plain(spec, query, key), logit_cap)

  einsums = {'qk_attn_weights_einsum': logits, 'attn_weights_value_einsum': plain}
  return nn.dot_product_attention(query, key, value, bias, mask, **options, **einsums)


def is_long(queries: int, keys: int) -> bool:
  """Whether the scores of so many tokens are never made whole."""
  return queries * keys >= LONG


def by_rows(query, key, value, bias=None, mask=None, *, dropout_rng=None, **options) -> jax.Array:
  """`dot_product_attention` by pieces: one key head, and some of the queries, at a time.

  What the backward pass keeps is query, key and value alone. For the arguments see
  `dot_product_attention`.
  """
  batch, length, heads, _ = query.shape
  key_heads = key.shape[-2]
  cut = _Cut(heads, key_heads, length, _pieces(batch, length, heads // key_heads, key.shape[1]))
  rows = mask if isinstance(mask, TokenMask) else None
  arrays = {
    'query': cut.queries(query),
    'key': cut.keys(key),
    'value': cut.keys(value),
    'bias': cut.scores(bias),
    'mask': cut.scores(mask) if rows is None else None,
    'places': None,
    'texts': None,
    'key_texts': None,
    'rng': None,
  }
  if rows is not None:
    arrays['places'] = cut.tokens(rows.places)
    arrays['texts'] = cut.tokens(rows.texts)
    if rows.key_texts is not None:
      arrays['key_texts'] = rows.key_texts[None, None]
  if dropout_rng is not None:
    arrays['rng'] = jax.random.split(dropout_rng, (key_heads, cut.count))

  def of_piece(query, key, value, bias, mask, places, texts, key_texts, rng):
    if rows is not None:
      piece = dataclasses.replace(rows, places=places, texts=texts, key_texts=key_texts)
      mask = piece.whole()
    return grouped_attention(query, key, value, bias, mask, dropout_rng=rng, **options)

  run = _recomputed(of_piece)
  out = _over(key_heads, lambda head: _over(cut.count, run, head), arrays)
  return cut.joined(out)


# The arguments of a piece of attention that may have a gradient.
_DIFFERENTIATED = ('query', 'key', 'value', 'bias')


def _recomputed(fn: Callable[..., jax.Array]) -> Callable[[dict[str, Any]], jax.Array]:
  """fn(**arrays) of {name: array}, which the backward pass computes again from these arrays.

  `jax.checkpoint` in two scans would make the masks of all pieces beforehand, since they are the
  same for all key heads: [pieces, n, M].
  """

  @jax.custom_vjp
  def run(own, others):
    return fn(**own, **others)

  def forward(own, others):
    return run(own, others), (own, others)

  def backward(kept, cotangent):
    own, others = kept
    _, pull = jax.vjp(lambda own: fn(**own, **others), own)
    return *pull(cotangent), None

  run.defvjp(forward, backward)

  def call(arrays):
    own = {name: arrays[name] for name in _DIFFERENTIATED}
    others = {name: x for name, x in arrays.items() if name not in own}
    return run(own, others)

  return call


def _pieces(batch: int, queries: int, group: int, keys: int) -> int:
  """Into how many pieces the queries are cut, so that none has more than MOST_SCORES."""
  most = max(1, MOST_SCORES // (batch * group * keys))
  return -(-queries // most)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How arrays are cut, by key heads and then by queries: [J, pieces, ...].

  An axis of one entry stands for all.

  Attributes:
    heads, key_heads, length: H, J, N.
    count: pieces of the queries, all alike; rows of zeros fill up the last one.
  """

  heads: int
  key_heads: int
  length: int
  count: int

  def rows(self, x: jax.Array, axis: int) -> jax.Array:
    """[.., N, ..] to [.., pieces, n, ..]."""
    size = -(-self.length // self.count)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, self.count * size - self.length)
    x = jnp.pad(x, widths)
    return x.reshape(*x.shape[:axis], self.count, size, *x.shape[axis + 1 :])

  def queries(self, x: jax.Array) -> jax.Array:
    """[B, N, H, K] to [J, pieces, B, n, G, K]."""
    return rearrange(self.rows(x, 1), 'b c n (j g) k -> j c b n g k', j=self.key_heads)

  def keys(self, x: jax.Array) -> jax.Array:
    """[B, M, J, K] to [J, 1, B, M, 1, K]."""
    return rearrange(x, 'b m (j one) k -> j 1 b m one k', one=1)

  def scores(self, x) -> jax.Array | None:
    """[.., H or 1, N or 1, M] to [J or 1, pieces or 1, .., G or 1, n or 1, M]."""
    if x is None:
      return None
    x = jnp.asarray(x)
    x = x.reshape(*[1] * (4 - x.ndim), *x.shape)
    x = self.rows(x, 2) if x.shape[2] != 1 else x[:, :, None]
    key_heads = self.key_heads if x.shape[1] != 1 else 1
    return rearrange(x, 'b (j g) c n m -> j c b g n m', j=key_heads)

  def tokens(self, x: jax.Array | None) -> jax.Array | None:
    """[.., N] to [1, pieces, .., n]."""
    if x is None:
      return None
    x = self.rows(x, x.ndim - 1)
    return jnp.moveaxis(x, -2, 0)[None]

  def joined(self, x: jax.Array) -> jax.Array:
    """[J, pieces, B, n, G, K] to [B, N, H, K]."""
    return rearrange(x, 'j c b n g k -> b (c n) (j g) k')[:, : self.length]


def _over(count: int, fn: Callable, arrays: dict[str, Any]) -> jax.Array:
  """fn of the entries of arrays along their first axis, one after the other.

  Args:
    count: entries; an array with one has the same for all, and goes in as it is.
    fn: called with {name: entry}.
    arrays: {name: array, or None for none}.
  """
  same = {name: x for name, x in arrays.items() if x is None or x.shape[0] != count}
  own = {name: x for name, x in arrays.items() if name not in same}
  same = {name: None if x is None else x[0] for name, x in same.items()}

  def step(_, entries):
    return None, fn(same | entries)

  return jax.lax.scan(step, None, own)[1]


def grouped_attention(
  query, key, value, bias=None, mask=None, *, dropout_rng=None, **options
) -> jax.Array:
  """`nn.dot_product_attention` for fewer key and value heads than query heads (arXiv:2305.13245).

  Query head h reads key head h // (H / J); keys and values are not repeated in memory.

  Args:
    query: [B, N, H, K].
    key, value: [B, M, J, K]; J divides H.
    bias: added to the logits, broadcastable to [B, H, N, M].
    mask: boolean, broadcastable to [B, H, N, M]; False hides a key.
    dropout_rng: key of the dropout, if any.
    **options: as `dot_product_attention` takes them.

  Returns:
    An array [B, N, H, K].
  """
  key_heads = key.shape[-2]
  # [B, N, J, G, K]: G query heads read each key head.
  query = rearrange(query, '... (j g) k -> ... j g k', j=key_heads)
  bias, bias_axis = _by_group(bias, key_heads)
  mask, mask_axis = _by_group(mask, key_heads)
  rngs = None
  rng_axis = None
  if dropout_rng is not None:
    rngs = jax.random.split(dropout_rng, query.shape[-2])
    rng_axis = 0

  def attention(query, bias, mask, rng):
    """One query head of every group, [B, N, J, K]."""
    return _capped_attention(query, key, value, bias, mask, dropout_rng=rng, **options)

  axes = (-2, bias_axis, mask_axis, rng_axis)
  out = jax.vmap(attention, in_axes=axes, out_axes=-2)(query, bias, mask, rngs)
  return rearrange(out, '... j g k -> ... (j g) k')


def _by_group(x, key_heads: int) -> tuple[jax.Array | None, int | None]:
  """(a bias or mask [.., J, G, N, M], the axis of G); (itself, None) if all heads have the same."""
  if x is None:
    return None, None
  x = jnp.asarray(x)
  if x.ndim < 3 or x.shape[-3] == 1:
    return x, None
  return rearrange(x, '... (j g) n m -> ... j g n m', j=key_heads), -3
