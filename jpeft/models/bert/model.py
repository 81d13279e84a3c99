"""BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692), MiniLM (arXiv:2002.10957) in one module."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..nn import (
  Encoder,
  PostNormBlock,
  Remat,
  block_of,
  check_pool,
  default_init,
  gelu,
  layer_norm,
)

POOLS = ('cls', 'mean', 'tokens')


class TokenEmbed(nn.Module):
  """Word, position and type embeddings, normalised.

  Attributes:
    width: D of the tokens.
    vocab: number of words.
    positions: rows of the position table.
    types: rows of the type table.
    pad_id: None counts positions from 0; a number counts them from pad_id + 1 and skips the tokens
      that equal pad_id (RoBERTa).
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
  eps: float = 1e-12
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, types=None, deterministic=True):
    longest = self.positions
    if self.pad_id is not None:
      longest -= self.pad_id + 1
    if tokens.shape[1] > longest:
      raise ValueError(
        f'{tokens.shape[1]} tokens are more than the {longest} positions that the '
        'model knows; truncate the text (data.max_length of a config)'
      )
    embed = functools.partial(
      nn.Embed,
      features=self.width,
      embedding_init=default_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    if self.pad_id is None:
      positions = jnp.arange(tokens.shape[1])[None]  # [1, N]
    else:
      real = (tokens != self.pad_id).astype(jnp.int32)
      positions = jnp.cumsum(real, 1) * real + self.pad_id  # [B, N]
    if types is None:
      types = jnp.zeros_like(tokens)
    x = embed(self.vocab, name='word')(tokens) + embed(self.types, name='type')(types)
    x = x + embed(self.positions, name='position')(positions)
    x = layer_norm(self, 'norm')(x)
    return nn.Dropout(self.dropout, name='dropout')(x, deterministic=deterministic)


class Bert(nn.Module):
  """A bidirectional text encoder with post-norm blocks.

  Called with tokens [B, N], it returns logits [B, num_classes], or the feature that a head would
  read when num_classes is None; with pool='mean' that is the sentence embedding.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: attention heads; a tuple has one number a block.
    mlp_dim: hidden width of the MLPs; a tuple has one number a block.
    vocab: number of words.
    positions: rows of the position table.
    types: rows of the token type table.
    pad_id: see `TokenEmbed`.
    num_classes: outputs of the head; None for no head.
    pool: what the head reads: 'cls' (the first token), 'mean' (of the tokens under the mask), or
      'tokens' (all hidden states [B, N, D], no head).
    pooler: whether tanh(Dense) follows the pooling.
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
  num_classes: int | None = None
  pool: str = 'cls'
  pooler: bool = False
  head_dim: int | None = None
  eps: float = 1e-12
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = nn.dot_product_attention
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
      Logits [B, num_classes], or the pooled feature.
    """
    check_pool(self.pool, POOLS, self.num_classes)
    dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = TokenEmbed(
      self.width,
      self.vocab,
      self.positions,
      self.types,
      pad_id=self.pad_id,
      eps=self.eps,
      dropout=self.dropout,
      name='embed',
      **dtypes,
    )
    x = embed(tokens, types, deterministic)  # [B, N, D]
    key_mask = None
    if mask is not None:
      key_mask = mask.astype(bool)[:, None, None, :]  # [B, 1, 1, N]
    block = block_of(self, PostNormBlock)
    encoder = Encoder(block, self.depth, self.scan, self.remat, name='encoder')
    x = encoder(x, mask=key_mask, deterministic=deterministic)  # [B, N, D]
    if self.pool == 'mean':
      x = masked_mean(x, mask)
    elif self.pool == 'cls':
      x = x[:, 0]
    dropout = nn.Dropout(self.dropout, name='dropout')
    dense = functools.partial(nn.Dense, kernel_init=default_init, **dtypes)
    if self.pooler:
      x = jnp.tanh(dense(self.width, name='pooler')(x))
    if self.num_classes is None:
      return x
    x = dropout(x, deterministic=deterministic)
    return dense(self.num_classes, name='head')(x)


def masked_mean(x, mask=None):
  """The mean over the tokens of x [B, N, D] for which mask [B, N] is nonzero."""
  if mask is None:
    return x.mean(1)
  weight = mask.astype(x.dtype)[..., None]  # [B, N, 1]
  return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)  # a row without tokens gives zero
