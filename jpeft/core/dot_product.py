"""Dot-product attention, also of fewer key and value heads than query heads.

Axes: B batch, N queries, M keys, H query heads, J key and value heads, K head size.
"""

import flax.linen as nn
import jax
from einops import rearrange


def dot_product_attention(query, key, value, *args, **kwargs) -> jax.Array:
  """`nn.dot_product_attention`, with as many or fewer key and value heads than query heads.

  Args:
    query: [B, N, H, K].
    key, value: [B, M, J, K]; J divides H.
    *args, **kwargs: as `nn.dot_product_attention` takes them; see `grouped_attention`.

  Returns:
    An array [B, N, H, K].
  """
  if key.shape[-2] == query.shape[-2]:
    return nn.dot_product_attention(query, key, value, *args, **kwargs)
  return grouped_attention(query, key, value, *args, **kwargs)


def grouped_attention(
  query, key, value, bias=None, mask=None, *, dropout_rng=None, **options
) -> jax.Array:
  """`nn.dot_product_attention` for fewer key and value heads than query heads (arXiv:2305.13245).

  Query head h reads key head h // (H / J); keys and values are not repeated in memory.

  Args:
    query: [B, N, H, K].
    key, value: [B, M, J, K]; J divides H.
    bias: added to the logits, broadcastable to [B, 1, N, M].
    mask: boolean, broadcastable to [B, 1, N, M]; False hides a key.
    dropout_rng: key of the dropout, if any.
    **options: as `nn.dot_product_attention` takes them.

  Returns:
    An array [B, N, H, K].
  """
  # [B, N, J, G, K]: G query heads read each key head.
  grouped = rearrange(query, '... (j g) k -> ... j g k', j=key.shape[-2])
  rngs = None
  rng_axis = None
  if dropout_rng is not None:
    rngs = jax.random.split(dropout_rng, grouped.shape[-2])
    rng_axis = 0

  def attention(query, rng):
    """One query head of every group, [B, N, J, K]."""
    return nn.dot_product_attention(
      query, key, value, bias=bias, mask=mask, dropout_rng=rng, **options
    )

  out = jax.vmap(attention, in_axes=(-2, rng_axis), out_axes=-2)(grouped, rngs)
  return rearrange(out, '... j g k -> ... (j g) k')
