"""ModernBERT (arXiv:2412.13663): a text encoder with rotary positions, windows and gated MLPs.

Axes: B batch, N tokens, D width.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import TokenMask, dot_product_attention

from ..nn import (
  MLP,
  Attention,
  Block,
  Encoder,
  Remat,
  Rope,
  RowRope,
  WordBias,
  WordEmbed,
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
MODERNBERT_HEADS = ('classification', 'tokens', 'questions', 'masked')


class ModernBertBlock(Block):
  """x + attention(norm(x)), then x + mlp(norm(x)); the first block has no norm before attention.

  Attributes:
    first: whether it is the first block, whose input the embedding has normalised.
    window: a token sees the tokens that stand less than `window` places from it, before and behind;
      None for all.
    rope: the rotary positions.
    window_rope: those of blocks with a window.
    attention_bias: whether the layers of attention have biases.
    mlp_bias: whether those of the MLP have.
    norm_bias: whether norms have.
    mlp_dropout: rate on the hidden layer of the MLP.
  """

  first: bool = False
  window: int | None = None
  rope: Rope = Rope()
  window_rope: Rope = Rope()
  attention_bias: bool = False
  mlp_bias: bool = False
  norm_bias: bool = False
  mlp_dropout: float = 0.0

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    seen = None
    if mask is not None or self.window is not None:
      seen = TokenMask.of_row(x.shape[1], mask, window=self.window, causal=False)
    attention = Attention(
      self.heads,
      self.head_dim,
      qkv_bias=self.attention_bias,
      out_bias=self.attention_bias,
      rope=RowRope(self.rope if self.window is None else self.window_rope),
      dropout=self.attention_dropout,
      attention_fn=self.attention_fn,
      name='attention',
      **types,
    )
    mlp = MLP(
      self.mlp_dim,
      self.activation,
      gated=True,
      use_bias=self.mlp_bias,
      dropout=self.mlp_dropout,
      name='mlp',
      **types,
    )
    y = x if self.first else layer_norm(self, 'norm1')(x)
    y = attention(y, mask=seen, bias=bias, deterministic=deterministic)
    x = x + nn.Dropout(self.dropout, name='dropout')(y, deterministic=deterministic)
    return x + mlp(layer_norm(self, 'norm2')(x), deterministic=deterministic)


class ModernBert(nn.Module):
  """A bidirectional text encoder with pre-norm blocks, most of which see a window of tokens.

  Called with tokens [B, N], it returns what its head gives; without a head the feature that a head
  would read.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: attention heads; a tuple has one number a block.
    mlp_dim: hidden width of the MLPs; a tuple has one number a block.
    vocab: number of words.
    positions: the most tokens of a row that the model was trained for; more are an error.
    window: see `ModernBertBlock`; a tuple has one value a block.
    rope: the rotary positions of blocks without a window.
    window_rope: those of blocks with one.
    attention_bias, mlp_bias, norm_bias: see `ModernBertBlock`.
    head_bias: whether the Dense inside the head has a bias.
    head_activation: after that Dense.
    num_classes: number of labels; None for a head without labels, or for no head.
    head: 'classification', 'tokens', 'questions' or 'masked', see `Bert`.
    pool: 'cls', 'mean' or 'tokens', see `Bert`.
    head_dim: size of a head; None for width / heads.
    eps: of the norms.
    activation: of the MLPs.
    dropout: rate on the hidden layers of the MLPs.
    embed_dropout: rate on the embedding.
    head_dropout: rate on what the last layer of the head reads.
    attention_dropout: rate on the attention probabilities, and on what attention adds.
    attention_fn: see `jpeft.models.nn.Attention`.
    scan: refused where blocks differ, and the first one does.
    remat: recompute blocks in the backward pass; see `run_blocks`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  depth: int
  heads: int | tuple[int, ...]
  mlp_dim: int | tuple[int, ...]
  vocab: int
  positions: int = 8192
  window: int | tuple[int | None, ...] | None = None
  rope: Rope = Rope(160000.0)
  window_rope: Rope = Rope(10000.0)
  attention_bias: bool = False
  mlp_bias: bool = False
  norm_bias: bool = False
  head_bias: bool = False
  head_activation: Callable[[jax.Array], jax.Array] = gelu
  num_classes: int | None = None
  head: str | None = None
  pool: str = 'cls'
  head_dim: int | None = None
  eps: float = 1e-5
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  embed_dropout: float = 0.0
  head_dropout: float = 0.0
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
      mask: [B, N]: 0 for padding; a row of several packed texts numbers them 1, 2, ..., and a token
        sees those of its own number. None if every row is one text.
      deterministic: no dropout.

    Returns:
      What the head gives, see the field `head`, or the pooled feature.

    Raises:
      ValueError: a row has more tokens than `positions`.
    """
    head = head_of(self, MODERNBERT_HEADS)
    check_pool(self.pool, POOLS, self.num_classes if head == 'classification' else None)
    check_positions(tokens.shape[1], self.positions)
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = WordEmbed(
      self.width,
      self.vocab,
      eps=self.eps,
      norm_bias=self.norm_bias,
      dropout=self.embed_dropout,
      name='embed',
      **types,
    )
    block = block_of(
      self,
      ModernBertBlock,
      first=(True, *(False,) * (self.depth - 1)),
      window=self.window,
      rope=self.rope,
      window_rope=self.window_rope,
      attention_bias=self.attention_bias,
      mlp_bias=self.mlp_bias,
      norm_bias=self.norm_bias,
      dropout=self.attention_dropout,
      mlp_dropout=self.dropout,
    )
    x = embed(tokens, deterministic)  # [B, N, D]
    if mask is not None:
      mask = mask.astype(jnp.int32)
    encoder = Encoder(block, self.depth, self.scan, self.remat, name='encoder')
    x = encoder(x, mask=mask, deterministic=deterministic)
    x = layer_norm(self, 'final_norm')(x)

    dense = functools.partial(nn.Dense, kernel_init=default_init, **types)
    if head in (None, 'classification'):
      x = pooled(x, mask, self.pool)
    if head is None:
      return x
    x = self.head_activation(dense(self.width, use_bias=self.head_bias, name='head_dense')(x))
    x = layer_norm(self, 'head_norm')(x)
    if head == 'masked':
      return WordBias(name='head', **types)(embed.word.attend(x))
    x = nn.Dropout(self.head_dropout, name='dropout')(x, deterministic=deterministic)
    return dense(outputs_of(self, head), name='head')(x)
