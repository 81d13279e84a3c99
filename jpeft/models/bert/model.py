"""BERT (arXiv:1810.04805) and its kin in one module.

RoBERTa (arXiv:1907.11692), XLM-R (arXiv:1911.02116), CamemBERT (arXiv:1911.03894), MiniLM
(arXiv:2002.10957), DistilBERT (arXiv:1910.01108), ELECTRA (arXiv:2003.10555) and MPNet
(arXiv:2004.09297).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import dot_product_attention

from ..nn import (
  Encoder,
  PositionBias,
  PostNormBlock,
  Remat,
  WordBias,
  block_of,
  check_pool,
  check_positions,
  default_init,
  gelu,
  head_of,
  layer_norm,
  outputs_of,
  pooled,
)

POOLS = ('cls', 'mean', 'tokens')
BERT_HEADS = ('classification', 'tokens', 'questions', 'masked')


class TokenEmbed(nn.Module):
  """Word, position and type embeddings, normalised.

  Attributes:
    width: D of the tokens.
    vocab: number of words.
    positions: rows of the position table.
    types: rows of the type table; 0 for no such table (DistilBERT).
    pad_id: None counts positions from 0; a number counts them from pad_id + 1 and skips the tokens
      that equal pad_id (RoBERTa).
    table_width: width of the tables where it differs from D; a Dense then follows (ELECTRA).
    eps: of the norm.
    dropout: rate on the result.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  vocab: int
  positions: int
  types: int
  pad_id: int | None = None
  table_width: int | None = None
  eps: float = 1e-12
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    width = self.table_width or self.width
    embed = functools.partial(nn.Embed, features=width, embedding_init=default_init, **dtypes)
    self.word = embed(self.vocab)
    self.position = embed(self.positions)
    if self.types:
      self.type = embed(self.types)
    self.norm = layer_norm(self)
    self.drop = nn.Dropout(self.dropout)
    if width != self.width:
      self.project = nn.Dense(self.width, kernel_init=default_init, **dtypes)

  def __call__(self, tokens, types=None, deterministic=True):
    longest = self.positions
    if self.pad_id is not None:
      longest -= self.pad_id + 1
    check_positions(tokens.shape[1], longest)
    if self.pad_id is None:
      positions = jnp.arange(tokens.shape[1])[None]  # [1, N]
    else:
      real = (tokens != self.pad_id).astype(jnp.int32)
      positions = jnp.cumsum(real, 1) * real + self.pad_id  # [B, N]
    x = self.word(tokens)
    if self.types:
      x = x + self.type(jnp.zeros_like(tokens) if types is None else types)
    x = x + self.position(positions)
    x = self.drop(self.norm(x), deterministic=deterministic)
    if self.table_width not in (None, self.width):
      x = self.project(x)
    return x


class Bert(nn.Module):
  """A bidirectional text encoder with post-norm blocks.

  Called with tokens [B, N], it returns what its head gives; without a head the feature that a head
  would read, which with pool='mean' is the sentence embedding.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: attention heads; a tuple has one number a block.
    mlp_dim: hidden width of the MLPs; a tuple has one number a block.
    vocab: number of words.
    positions: rows of the position table.
    types: rows of the token type table; 0 for none.
    pad_id: see `TokenEmbed`.
    table_width: see `TokenEmbed`.
    bias_buckets: rows of a table of relative positions, whose bias all blocks share; None for none
      (MPNet has one).
    num_classes: number of labels; None for a head without labels, or for no head.
    head: 'classification': logits [B, num_classes] of the pooled feature; 'tokens': the same of
      each token, [B, N, num_classes]; 'questions': logits [B, N, 2] that an answer starts and ends
      at a token; 'masked': logits [B, N, vocab] of the word at each token. None is
      'classification' if there are num_classes, else no head.
    pool: what a head of the pooled feature reads, or what is returned without a head: 'cls' (the
      first token), 'mean' (of the tokens under the mask), or 'tokens' (all hidden states [B, N, D],
      no head).
    pooler: whether a Dense follows the pooling.
    pooler_activation: after that Dense.
    head_activation: inside the head of masked words.
    head_dim: size of a head; None for width / heads.
    eps: of the norms.
    activation: of the MLPs.
    dropout: rate on the embedding, on each branch and on the pooled feature.
    attention_dropout: rate on the attention probabilities.
    attention_fn: see `jpeft.models.nn.Attention`.
    scan: run the blocks by nn.scan.
    remat: recompute blocks in the backward pass; see `run_blocks`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  depth: int
  heads: int | tuple[int, ...]
  mlp_dim: int | tuple[int, ...]
  vocab: int
  positions: int = 512
  types: int = 2
  pad_id: int | None = None
  table_width: int | None = None
  bias_buckets: int | None = None
  num_classes: int | None = None
  head: str | None = None
  pool: str = 'cls'
  pooler: bool = False
  pooler_activation: Callable[[jax.Array], jax.Array] = jnp.tanh
  head_activation: Callable[[jax.Array], jax.Array] = gelu
  head_dim: int | None = None
  eps: float = 1e-12
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, mask=None, types=None, deterministic=True):
    """Runs the model.

    Args:
      tokens: word ids [B, N].
      mask: [B, N], nonzero where a token is real; None when all are.
      types: segment ids [B, N]; None for zeros.
      deterministic: no dropout.

    Returns:
      What the head gives, see the field `head`, or the pooled feature.
    """
    head = head_of(self, BERT_HEADS)
    check_pool(self.pool, POOLS, self.num_classes if head == 'classification' else None)
    dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = TokenEmbed(
      self.width,
      self.vocab,
      self.positions,
      self.types,
      pad_id=self.pad_id,
      table_width=self.table_width,
      eps=self.eps,
      dropout=self.dropout,
      name='embed',
      **dtypes,
    )
    x = embed(tokens, types, deterministic)  # [B, N, D]
    key_mask = None
    if mask is not None:
      key_mask = mask.astype(bool)[:, None, None, :]  # [B, 1, 1, N]
    bias = None
    if self.bias_buckets is not None:
      bias = PositionBias(self.heads, self.bias_buckets, name='position_bias', **dtypes)
      bias = bias(x.shape[1], x.shape[1])  # [1, H, N, N]
    block = block_of(self, PostNormBlock)
    encoder = Encoder(block, self.depth, self.scan, self.remat, name='encoder')
    x = encoder(x, mask=key_mask, bias=bias, deterministic=deterministic)  # [B, N, D]

    dense = functools.partial(nn.Dense, kernel_init=default_init, **dtypes)
    if head == 'masked':
      x = dense(self.table_width or self.width, name='head_dense')(x)
      x = layer_norm(self, 'head_norm')(self.head_activation(x))
      return WordBias(name='head', **dtypes)(embed.word.attend(x))
    if head in (None, 'classification'):
      x = pooled(x, mask, self.pool)
      if self.pooler:
        x = self.pooler_activation(dense(self.width, name='pooler')(x))
    if head is None:
      return x
    x = nn.Dropout(self.dropout, name='dropout')(x, deterministic=deterministic)
    return dense(outputs_of(self, head), name='head')(x)
