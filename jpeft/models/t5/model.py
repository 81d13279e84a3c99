"""T5 v1.0 (arXiv:1910.10683) and v1.1 (gated MLP, own head): encoders and decoders of text.

Positions are relative: a bias on the attention logits, shared by all blocks of a stack. No layer
has a bias, norms are RMSNorm, and attention logits are not divided by sqrt(head_dim).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import dot_product_attention

from ..nn import (
  MLP,
  Attention,
  Block,
  Maker,
  PositionBias,
  Remat,
  bias_of_heads,
  block_of,
  check_pool,
  head_of,
  masked_mean,
  outputs_of,
  rms_norm,
  run_blocks,
  shared_bias_heads,
)

POOLS = ('mean', 'tokens')
T5_HEADS = ('tokens', 'text')

_init = nn.initializers.lecun_normal()


class T5Block(Block):
  """Pre-norm self-attention, cross-attention in a decoder, and MLP.

  Attributes:
    gated: whether the MLP has a gate (v1.1).
    cross: whether the block attends to a context.
    cross_heads: attention heads there; None for as many as in self-attention.
    bias_heads: for each head of self-attention the head of the bias that it reads; None for all in
      their order.
  """

  gated: bool = False
  cross: bool = False
  cross_heads: int | None = None
  bias_heads: tuple[int, ...] | None = None

  @nn.compact
  def __call__(self, x, mask=None, bias=None, context=None, context_mask=None, deterministic=True):
    types = {'kernel_init': _init, 'dtype': self.dtype, 'param_dtype': self.param_dtype}
    dropout = nn.Dropout(self.dropout, name='dropout')
    make_attention = functools.partial(
      Attention,
      head_dim=self.head_dim,
      qkv_bias=False,
      out_bias=False,
      scaled=False,
      dropout=self.attention_dropout,
      attention_fn=self.attention_fn,
      **types,
    )

    attention = make_attention(self.heads, name='attention')
    bias = bias_of_heads(bias, self.heads, self.bias_heads)
    y = rms_norm(self, 'norm1')(x)
    y = attention(y, mask=mask, bias=bias, deterministic=deterministic)
    x = x + dropout(y, deterministic=deterministic)
    if self.cross:
      attention = make_attention(self.cross_heads or self.heads, name='cross_attention')
      y = rms_norm(self, 'norm_cross')(x)
      y = attention(y, context, mask=context_mask, deterministic=deterministic)
      x = x + dropout(y, deterministic=deterministic)
    mlp = MLP(
      self.mlp_dim,
      self.activation,
      gated=self.gated,
      use_bias=False,
      dropout=self.dropout,
      name='mlp',
      **types,
    )
    y = mlp(rms_norm(self, 'norm2')(x), deterministic=deterministic)
    return x + dropout(y, deterministic=deterministic)


class T5Stack(nn.Module):
  """Position bias, blocks and final norm of the encoder or the decoder.

  Attributes:
    block: makes a block, see `run_blocks`.
    depth: number of blocks.
    position_bias: makes the position bias: position_bias(name=...).
    dropout: rate on the input and on the output.
    eps: of the final norm.
    scan: run the blocks by nn.scan.
    remat: recompute blocks in the backward pass; see `run_blocks`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  block: Maker | tuple[Maker, ...]
  depth: int
  position_bias: Callable[..., nn.Module]
  dropout: float = 0.0
  eps: float = 1e-6
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None, deterministic=True, **context):
    """Runs the stack on x [B, N, D]; `context` are further inputs of every block."""
    dropout = nn.Dropout(self.dropout, name='dropout')
    bias = self.position_bias(name='position_bias')(x.shape[1], x.shape[1])  # [1, H, N, N]
    x = run_blocks(
      self.block,
      self.depth,
      dropout(x, deterministic=deterministic),
      scan=self.scan,
      remat=self.remat,
      mask=mask,
      bias=bias,
      deterministic=deterministic,
      **context,
    )
    x = rms_norm(self, 'final_norm')(x)
    return dropout(x, deterministic=deterministic)


class T5(nn.Module):
  """An encoder-decoder of text; called with tokens and decoder tokens, it returns logits.

  With another head than 'text' it is the encoder alone, and called with tokens.

  Numbers of heads and hidden widths are those of all blocks, or a tuple with one a block.

  Attributes:
    width: D of the residual stream.
    depth: number of encoder blocks.
    heads: attention heads.
    mlp_dim: hidden width of the MLPs.
    vocab: number of words.
    head_dim: size of a head; heads * head_dim may differ from width.
    decoder_depth: number of decoder blocks; None for as many as in the encoder.
    decoder_heads: heads of self-attention in the decoder; None for as many as in the encoder.
    cross_heads: heads of cross-attention; None for as many as in the decoder's self-attention.
    decoder_mlp_dim: hidden width of the decoder's MLPs; None for that of the encoder's.
    bias_heads: for each encoder block the heads of the position bias that its heads read; None for
      all in their order.
    decoder_bias_heads: the same for the decoder.
    gated: whether the MLPs have a gate (v1.1).
    tied: whether the logits come from the word table; else from a Dense `head`.
    num_classes: number of labels of the head 'tokens'.
    head: 'text': logits [B, M, vocab] of what the decoder writes; 'tokens': logits
      [B, N, num_classes] of each token of the encoder. None for the encoder without a head.
    pool: what the encoder returns without a head: 'tokens' (all hidden states [B, N, D]) or 'mean'
      (of those under the mask).
    scale_output: whether the decoder's output is divided by sqrt(width) before the head.
    buckets: rows of the tables of relative positions.
    max_distance: from here on distances share a row.
    eps: of the norms.
    activation: of the MLPs.
    dropout: rate everywhere but on attention probabilities.
    attention_dropout: rate there.
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
  head_dim: int = 64
  decoder_depth: int | None = None
  decoder_heads: int | tuple[int, ...] | None = None
  cross_heads: int | tuple[int, ...] | None = None
  decoder_mlp_dim: int | tuple[int, ...] | None = None
  bias_heads: tuple[tuple[int, ...], ...] | None = None
  decoder_bias_heads: tuple[tuple[int, ...], ...] | None = None
  gated: bool = False
  tied: bool = True
  num_classes: int | None = None
  head: str | None = 'text'
  pool: str = 'tokens'
  scale_output: bool = True
  buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  activation: Callable[[jax.Array], jax.Array] = nn.relu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, decoder_tokens=None, mask=None, decoder_mask=None, deterministic=True):
    """Runs the model.

    Args:
      tokens: word ids [B, N].
      decoder_tokens: ids of the words that the decoder has written before each position [B, M]: the
        target shifted right, see `shift_right`; None for the encoder alone.
      mask: [B, N], nonzero where a token is real; None when all are.
      decoder_mask: the same for decoder_tokens [B, M].
      deterministic: no dropout.

    Returns:
      What the head gives, see the field `head`, or the feature of the encoder.

    Raises:
      ValueError: decoder tokens are missing, or there is no decoder to read them.
    """
    head = head_of(self, T5_HEADS)
    check_pool(self.pool, POOLS)
    if (head == 'text') != (decoder_tokens is not None):
      raise ValueError(
        "decoder_tokens are for a T5 with the head 'text', which writes them: this one has the "
        f'head {head!r}, and decoder_tokens {"were" if head != "text" else "were not"} given'
      )
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = nn.Embed(
      self.vocab, self.width, embedding_init=nn.initializers.normal(1.0), name='embed', **types
    )
    encoder = _stack(self, 'encoder', self.depth)
    context_mask = _key_mask(mask)
    context = encoder(embed(tokens), mask=context_mask, deterministic=deterministic)  # [B, N, D]
    if head is None:
      return masked_mean(context, mask) if self.pool == 'mean' else context
    if head == 'tokens':
      dropout = nn.Dropout(self.dropout, name='dropout')
      context = dropout(context, deterministic=deterministic)
      return nn.Dense(outputs_of(self, head), kernel_init=_init, name='head', **types)(context)

    decoder = _stack(self, 'decoder', self.decoder_depth or self.depth)
    causal = nn.make_causal_mask(decoder_tokens, dtype=bool)  # [B, 1, M, M]
    if decoder_mask is not None:
      causal = causal & _key_mask(decoder_mask)
    x = decoder(
      embed(decoder_tokens),
      mask=causal,
      context=context,
      context_mask=context_mask,
      deterministic=deterministic,
    )  # [B, M, D]
    if self.scale_output:
      # A word table shared with the embedding has entries of order one; so then have the logits.
      x = x * self.width**-0.5
    if self.tied:
      return embed.attend(x)
    return nn.Dense(self.vocab, use_bias=False, kernel_init=_init, name='head', **types)(x)


def _stack(model: T5, name: str, depth: int) -> T5Stack:
  """The encoder or the decoder of a model, with its sizes and rates."""
  types = {'dtype': model.dtype, 'param_dtype': model.param_dtype}
  is_decoder = name == 'decoder'
  sizes = decoder_sizes(model) if is_decoder else encoder_sizes(model)
  block = block_of(model, T5Block, depth, gated=model.gated, cross=is_decoder, **sizes)
  position_bias = functools.partial(
    PositionBias,
    shared_bias_heads(sizes['heads'], sizes['bias_heads'], depth),
    model.buckets,
    model.max_distance,
    bidirectional=not is_decoder,
    **types,
  )
  return T5Stack(
    block,
    depth,
    position_bias,
    dropout=model.dropout,
    eps=model.eps,
    scan=model.scan,
    remat=model.remat,
    name=name,
    **types,
  )


def encoder_sizes(model: T5) -> dict[str, Any]:
  """The sizes of the encoder's blocks, by the names of a block's fields."""
  return {'heads': model.heads, 'mlp_dim': model.mlp_dim, 'bias_heads': model.bias_heads}


def decoder_sizes(model: T5) -> dict[str, Any]:
  """The sizes of the decoder's blocks, by the names of a block's fields."""
  sizes = encoder_sizes(model) | {'bias_heads': model.decoder_bias_heads}
  if model.decoder_heads is not None:
    sizes['heads'] = model.decoder_heads
  if model.decoder_mlp_dim is not None:
    sizes['mlp_dim'] = model.decoder_mlp_dim
  sizes['cross_heads'] = sizes['heads']
  if model.cross_heads is not None:
    sizes['cross_heads'] = model.cross_heads
  return sizes


def _key_mask(mask):
  """The mask [B, 1, 1, N] of an attention, of one over its keys [B, N]; None for None."""
  if mask is None:
    return None
  return mask.astype(bool)[:, None, None, :]


def shift_right(tokens, start: int = 0):
  """Decoder inputs for a target [B, M]: `start` (T5: the pad id), then all but its last token."""
  return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=start)[:, :-1]
