"""DeBERTa-v3 (arXiv:2111.09543): a BERT that attends to words and to distances, each apart.

Disentangled attention (arXiv:2006.03654). Of the distance i - j there is a bucket d(i, j), and of
each bucket one learned vector r, the same in all blocks. Queries and keys of the vectors come from
the layers that make those of tokens:

  logit(i, j) = (q_i . k_j + q_i . K(r_d(i, j)) + k_j . Q(r_d(i, j))) / sqrt(3 head size)

for the published weights, where the paper has d(j, i) in the last product. Near distances have a
bucket each, far ones share buckets that widen logarithmically. Nothing else tells a token its
place, so that the embedding is that of words alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jpeft.core import dot_product_attention

from ..nn import (
  MLP,
  Block,
  Remat,
  WordEmbed,
  attend,
  block_of,
  check_pool,
  check_positions,
  default_init,
  gelu,
  head_of,
  layer_norm,
  outputs_of,
  pooled,
  run_blocks,
)

POOLS = ('cls', 'mean', 'tokens')
DEBERTA_HEADS = ('classification', 'tokens', 'questions')


class Distances(NamedTuple):
  """The buckets of distances.

  Attributes:
    buckets: of each direction; the table has twice as many rows.
    furthest: from here on distances share the last bucket.
  """

  buckets: int = 256
  furthest: int = 512

  def rows(self, tokens: int) -> np.ndarray:
    """The row of the table for the distance of each token from each other one, [N, N].

    In float32, as it was trained, since a bucket ends where a logarithm is a whole number.
    """
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None]
    near = self.buckets // 2
    size = np.maximum(np.abs(distance), near).astype(np.float32)
    widening = np.log(np.float32((self.furthest - 1) / near))
    far = np.ceil(np.log(size / np.float32(near)) / widening * np.float32(near - 1)) + near
    bucket = np.where(np.abs(distance) <= near, distance, np.sign(distance) * far).astype(np.int64)
    return np.clip(bucket + self.buckets, 0, 2 * self.buckets - 1)


class DisentangledAttention(nn.Module):
  """Attention to words and to distances.

  Attributes:
    heads, head_dim, dropout, attention_fn, dtype, param_dtype: see `jpeft.models.nn.Attention`.
    distances: the buckets.
    table_dropout: rate on the vectors of the buckets.
  """

  heads: int
  head_dim: int
  distances: Distances
  dropout: float = 0.0
  table_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, table, mask=None, deterministic=True):
    """Attends from x [B, N, D] to itself.

    Args:
      x: tokens.
      table: the vectors of the buckets, [2 buckets, D].
      mask: boolean, broadcastable to [B, H, N, N]; False hides a key.
      deterministic: no dropout.

    Returns:
      An array [B, N, D].
    """
    dense = functools.partial(
      nn.Dense, kernel_init=default_init, dtype=self.dtype, param_dtype=self.param_dtype
    )
    query_layer, key_layer, value_layer = (
      dense(self.heads * self.head_dim, name=name) for name in ('query', 'key', 'value')
    )

    def heads(y):
      return rearrange(y, 'b n (h k) -> b n h k', h=self.heads)

    query, key, value = (heads(layer(x)) for layer in (query_layer, key_layer, value_layer))
    dropped = nn.Dropout(self.table_dropout, name='table_dropout')
    table = dropped(table[None], deterministic=deterministic)  # [1, R, D]
    row_query, row_key = heads(query_layer(table))[0], heads(key_layer(table))[0]  # [R, H, K]

    rows = self.distances.rows(x.shape[1])
    to_row = jnp.einsum('bnhk,rhk->bhnr', query, row_key)
    from_row = jnp.einsum('bmhk,rhk->bhmr', key, row_query)
    bias = jnp.take_along_axis(to_row, rows[None, None], -1)  # [B, H, N, N]
    bias += jnp.take_along_axis(from_row, rows.T[None, None], -1).swapaxes(-1, -2)
    # `attention_fn` divides by sqrt(head_dim), and there are three products.
    bias /= np.sqrt(3 * self.head_dim).astype(bias.dtype)
    query = query / np.sqrt(3).astype(query.dtype)
    joined = attend(self, query, key, value, mask=mask, bias=bias, deterministic=deterministic)
    return dense(x.shape[-1], name='out')(joined)


class DebertaBlock(Block):
  """norm(x + attention(x)), then norm(x + mlp(x)), with disentangled attention.

  Attributes:
    distances: see `DisentangledAttention`.
  """

  distances: Distances = Distances()

  @nn.compact
  def __call__(self, x, table, mask=None, deterministic=True):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    attention = DisentangledAttention(
      self.heads,
      self.head_dim,
      self.distances,
      dropout=self.attention_dropout,
      table_dropout=self.dropout,
      attention_fn=self.attention_fn,
      name='attention',
      **types,
    )
    dropout = nn.Dropout(self.dropout, name='dropout')
    y = attention(x, table, mask=mask, deterministic=deterministic)
    x = layer_norm(self, 'norm1')(x + dropout(y, deterministic=deterministic))
    y = MLP(self.mlp_dim, self.activation, name='mlp', **types)(x, deterministic=deterministic)
    return layer_norm(self, 'norm2')(x + dropout(y, deterministic=deterministic))


class DebertaEncoder(nn.Module):
  """Blocks, and the vectors of distances that they share.

  Attributes:
    block: makes a block.
    depth: number of blocks.
    rows: of the table of vectors.
    scan, remat: see `run_blocks`.
    eps, dtype, param_dtype: of the norm of the vectors.
  """

  block: Callable[..., nn.Module]
  depth: int
  rows: int
  scan: bool = False
  remat: Remat = False
  eps: float = 1e-7
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None, deterministic=True):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    table = nn.Embed(self.rows, x.shape[-1], embedding_init=default_init, name='distances', **types)
    table = layer_norm(self, 'distance_norm')(table(jnp.arange(self.rows)))
    return run_blocks(
      self.block,
      self.depth,
      x,
      scan=self.scan,
      remat=self.remat,
      table=table,
      mask=mask,
      deterministic=deterministic,
    )


class Deberta(nn.Module):
  """A bidirectional text encoder whose attention sees words and distances apart.

  Called with tokens [B, N], it returns what its head gives; without a head the feature that a head
  would read.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: attention heads.
    mlp_dim: hidden width of the MLPs.
    vocab: number of words.
    positions: the most tokens of a row; more are an error.
    distances: the buckets of distances.
    num_classes: number of labels; None for a head without labels, or for no head.
    head: 'classification', 'tokens' or 'questions', see `Bert`.
    pool: 'cls', 'mean' or 'tokens', see `Bert`.
    pooler_activation: after the Dense that a head of the pooled feature reads.
    head_dim: size of a head; None for width / heads.
    eps: of the norms.
    activation: of the MLPs.
    dropout: rate on the embedding, on each branch, on the vectors of distances and on the pooled
      feature.
    attention_dropout: rate on the attention probabilities.
    attention_fn: see `jpeft.models.nn.Attention`.
    scan: run the blocks by nn.scan.
    remat: recompute blocks in the backward pass; see `run_blocks`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  depth: int
  heads: int
  mlp_dim: int
  vocab: int
  positions: int = 512
  distances: Distances = Distances()
  num_classes: int | None = None
  head: str | None = None
  pool: str = 'cls'
  pooler_activation: Callable[[jax.Array], jax.Array] = gelu
  head_dim: int | None = None
  eps: float = 1e-7
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, mask=None, deterministic=True):
    """Runs the model.

    Args:
      tokens: word ids [B, N].
      mask: [B, N], nonzero where a token is real; None when all are.
      deterministic: no dropout.

    Returns:
      What the head gives, see the field `head`, or the pooled feature.

    Raises:
      ValueError: a row has more tokens than `positions`.
    """
    head = head_of(self, DEBERTA_HEADS)
    check_pool(self.pool, POOLS, self.num_classes if head == 'classification' else None)
    check_positions(tokens.shape[1], self.positions)
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = WordEmbed(self.width, self.vocab, self.eps, dropout=self.dropout, name='embed', **types)
    x = embed(tokens, deterministic)  # [B, N, D]
    key_mask = None
    if mask is not None:
      key_mask = mask.astype(bool)[:, None, None, :]  # [B, 1, 1, N]
    encoder = DebertaEncoder(
      block_of(self, DebertaBlock, distances=self.distances),
      self.depth,
      2 * self.distances.buckets,
      self.scan,
      self.remat,
      self.eps,
      name='encoder',
      **types,
    )
    x = encoder(x, mask=key_mask, deterministic=deterministic)

    dense = functools.partial(nn.Dense, kernel_init=default_init, **types)
    if head in (None, 'classification'):
      x = pooled(x, mask, self.pool)
    if head is None:
      return x
    if head == 'classification':
      x = self.pooler_activation(dense(self.width, name='pooler')(x))
    x = nn.Dropout(self.dropout, name='dropout')(x, deterministic=deterministic)
    return dense(outputs_of(self, head), name='head')(x)
