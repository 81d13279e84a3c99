"""GPT-2 (Radford et al. 2019) and OPT (arXiv:2205.01068): decoders with learned positions.

Axes: B batch, N tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import dot_product_attention

from ..llama import CausalAttention, positions_in, seen_tokens
from ..nn import (
  MLP,
  Block,
  Encoder,
  Remat,
  WordTable,
  block_of,
  check_positions,
  decoder_head,
  default_init,
  gelu_tanh,
  layer_norm,
  read_out,
)


class LearnedPositions(nn.Module):
  """A vector for each place that a token has in its text; the places go on in the cache.

  Attributes:
    count: places that the model knows.
    width: D of the vectors.
    offset: rows of the table before that of the first place.
    dtype: of the vectors.
    param_dtype: of the table.
  """

  count: int
  width: int
  offset: int = 0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, mask=None):
    """The vectors [B or 1, N, D] of tokens [B, N] under a mask [B, N] as `Gpt` takes it.

    Raises:
      ValueError: there are more tokens than places, those in the cache included.
    """
    seen = seen_tokens(self, tokens.shape, mask)
    check_positions(seen.keys, self.count, ', or write fewer new tokens')
    table = self.param(
      'embedding', default_init, (self.count + self.offset, self.width), self.param_dtype
    )
    positions = jnp.atleast_2d(positions_in(seen))
    return jnp.take(table.astype(self.dtype), positions + self.offset, axis=0)


class GptBlock(Block):
  """Attention and MLP with biases; norms are LayerNorm, before each branch or behind it.

  Attributes:
    use_bias: whether the linear maps have biases.
    post_norm: whether the norms come behind what each branch adds to the stream.
  """

  attention_fn: Callable[..., jax.Array] = dot_product_attention
  use_bias: bool = True
  post_norm: bool = False

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    dropout = nn.Dropout(self.dropout, name='dropout')
    attention = CausalAttention(
      self.heads,
      self.head_dim,
      kv_heads=self.heads,
      qkv_bias=self.use_bias,
      out_bias=self.use_bias,
      rope=None,
      dropout=self.attention_dropout,
      attention_fn=self.attention_fn,
      name='attention',
      **types,
    )
    mlp = MLP(self.mlp_dim, self.activation, use_bias=self.use_bias, name='mlp', **types)
    norm1 = layer_norm(self, 'norm1')
    norm2 = layer_norm(self, 'norm2')

    def added(x, branch, norm, **options):
      y = branch(x if self.post_norm else norm(x), deterministic=deterministic, **options)
      x = x + dropout(y, deterministic=deterministic)
      return norm(x) if self.post_norm else x

    x = added(x, attention, norm1, mask=mask, bias=bias)
    return added(x, mlp, norm2)


class Gpt(nn.Module):
  """A decoder of text; called with tokens, it returns the logits of the token after each.

  It may have another head in place of that one, and read a text instead of writing one.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: attention heads; a tuple has one number a block.
    mlp_dim: hidden width of the MLPs; a tuple has one number a block.
    vocab: number of words.
    positions: places that a token may have.
    position_offset: rows of the table of positions before that of the first place (OPT has 2).
    head_dim: size of a head; None for width / heads.
    table_width: width of the word table where it differs from D; a Dense then stands behind the
      table, and another one before the head (OPT of 350M).
    tied: whether the logits of words come from the word table; else from a Dense `head`.
    num_classes, head, pool: see `Llama`.
    use_bias: whether the linear maps of the blocks have biases.
    post_norm: whether norms come behind the branches of a block (OPT of 350M).
    final_norm: whether a norm follows the last block.
    eps: of the norms.
    activation: of the MLPs.
    dropout: rate on what each branch adds to the stream.
    embed_dropout: rate on the embedded tokens.
    attention_dropout: rate on the attention probabilities.
    attention_fn: called as `dot_product_attention`.
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
  positions: int
  position_offset: int = 0
  head_dim: int | None = None
  table_width: int | None = None
  tied: bool = True
  num_classes: int | None = None
  head: str | None = 'text'
  pool: str = 'last'
  use_bias: bool = True
  post_norm: bool = False
  final_norm: bool = True
  eps: float = 1e-5
  activation: Callable[[jax.Array], jax.Array] = gelu_tanh
  dropout: float = 0.0
  embed_dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, mask=None, deterministic=True):
    """Runs the model. With the collection 'cache' mutable it continues the texts in the cache.

    Args:
      tokens: word ids [B, N].
      mask: [B, N]: 0 for padding, which may stand before the text as well as behind it. A row of
        several packed texts numbers them 1, 2, ...: a token sees those of its own number, and its
        position is counted among them. None if every row is one text.
      deterministic: no dropout.

    Returns:
      What the head gives, see the field `head`, or the pooled feature.
    """
    head = decoder_head(self)
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    table_width = self.table_width or self.width
    embed = WordTable(self.vocab, table_width, embedding_init=default_init, name='embed', **types)
    position = LearnedPositions(
      self.positions, self.width, self.position_offset, name='position', **types
    )
    block = block_of(self, GptBlock, use_bias=self.use_bias, post_norm=self.post_norm)
    decoder = Encoder(block, self.depth, self.scan, self.remat, name='decoder')

    def projected(name, x, width):
      if table_width == self.width:
        return x
      return nn.Dense(width, use_bias=False, kernel_init=default_init, name=name, **types)(x)

    x = projected('project_in', embed(tokens), self.width) + position(tokens, mask)
    x = nn.Dropout(self.embed_dropout, name='dropout')(x, deterministic=deterministic)
    x = decoder(x, mask=mask, deterministic=deterministic)  # [B, N, D]
    if self.final_norm:
      x = layer_norm(self, 'final_norm')(x)
    x = projected('project_out', x, table_width)
    return read_out(self, head, x, mask, embed)
