"""Decoders of the Llama family (arXiv:2302.13971): Llama, Mistral, SmolLM2, Qwen2, Qwen3, Gemma.

Axes: B batch, N tokens, M tokens with those in the cache, H query heads, J key and value heads,
  K head size, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import TokenMask, dot_product_attention

from ..nn import (
  MLP,
  Block,
  Encoder,
  Experts,
  Remat,
  Rope,
  SparseMLP,
  WordTable,
  attend,
  block_of,
  decoder_head,
  default_init,
  read_out,
  rms_norm,
)


def positions_in(mask: TokenMask) -> jax.Array:
  """The positions of the tokens that a mask is of, for the rotation.

  Returns:
    Integers [N], places in the row; or, where rows have several texts or padding, [B, N]: how many
    tokens of its own text stand before each.
  """
  if mask.texts is None:
    return mask.places
  before = dataclasses.replace(mask, window=None).whole()  # reduced where it is made: never stored
  return before[:, 0].sum(-1) - 1


def is_caching(module: nn.Module) -> bool:
  """Whether a call of a module writes what later calls read, in the collection 'cache'.

  The first call makes room for as many tokens as it is called with; later calls write theirs behind
  those that came before.
  """
  return module.is_mutable_collection('cache') and not module.is_initializing()


def seen_tokens(
  module: nn.Module, shape: tuple[int, int], mask: jax.Array | None, window: int | None = None
) -> TokenMask:
  """Which tokens those of a call see, and where they stand; the module's cache counts them.

  Args:
    module: bound; it counts its own calls.
    shape: (B, N) of the call.
    mask: [B, N] as `Llama` takes it.
    window: see `CausalAttention`.
  """
  start = module.get_variable('cache', 'length', 0)
  texts = None
  if mask is not None:
    texts = mask.astype(jnp.int32)
  elif is_caching(module):
    texts = jnp.ones(shape, jnp.int32)
  key_texts = texts
  if is_caching(module):
    key_texts = _cached(module, 'texts', texts, start)
    module.put_variable('cache', 'length', jnp.asarray(start + shape[1], jnp.int32))
  keys = shape[1] if key_texts is None else key_texts.shape[1]
  return TokenMask(start + jnp.arange(shape[1]), texts, key_texts, keys, window)


def _cached(module: nn.Module, name: str, new: jax.Array, start) -> jax.Array:
  """Writes `new` behind the first `start` tokens of a cached array, and returns all of it."""
  cached = module.get_variable('cache', name, jnp.zeros_like(new))
  cached = jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), start, axis=1)
  module.put_variable('cache', name, cached)
  return cached


class CausalAttention(nn.Module):
  """Self-attention of tokens to those before them, with rotary positions and a cache.

  For the cache see `is_caching`.

  Attributes:
    heads: query heads H.
    head_dim: size of a head K; heads * head_dim may differ from the width of the input.
    kv_heads: key and value heads J.
    qkv_bias: whether query, key and value have a bias.
    out_bias: whether the output projection has a bias.
    qk_norm: whether each head of queries and keys is normalised (RMSNorm) before the rotation.
    unit_norms: whether these norms are `UnitRMSNorm`.
    query_scale: what logits are multiplied by; None for 1 / sqrt(head_dim).
    logit_cap: the `soft_cap` of the logits; None for none.
    rope: the rotary positions; None for none.
    window: a token sees itself and the window - 1 before it; None for all before it.
    eps: of the norms.
    dropout: rate on the attention probabilities.
    attention_fn: called as `dot_product_attention`, with J heads of keys and values, and with
      logit_cap if there is one.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  heads: int
  head_dim: int
  kv_heads: int
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False
  unit_norms: bool = False
  query_scale: float | None = None
  logit_cap: float | None = None
  rope: Rope | None = Rope()
  window: int | None = None
  eps: float = 1e-6
  dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    """Attends within x [B, N, D], under a mask [B, N] as `Llama` takes it; returns [B, N, D]."""
    dense = functools.partial(
      nn.Dense, kernel_init=default_init, dtype=self.dtype, param_dtype=self.param_dtype
    )

    def heads(name, count, norm):
      y = dense(count * self.head_dim, use_bias=self.qkv_bias, name=name)(x)
      y = rearrange(y, 'b n (h k) -> b n h k', h=count)
      if norm:
        y = rms_norm(self, f'{name}_norm')(y)
      return y

    query = heads('query', self.heads, self.qk_norm)  # [B, N, H, K]
    key = heads('key', self.kv_heads, self.qk_norm)  # [B, N, J, K]
    value = heads('value', self.kv_heads, False)  # [B, N, J, K]

    start = self.get_variable('cache', 'length', 0)
    seen = seen_tokens(self, x.shape[:2], mask, self.window)
    if self.rope is not None:
      positions = positions_in(seen)
      query = self.rope.rotate(query, positions, seen.keys)
      # Keys are stored as rotated: their positions never change.
      key = self.rope.rotate(key, positions, seen.keys)
    if self.query_scale is not None:
      # attention_fn divides by sqrt(head_dim) itself.
      query = query * jnp.asarray(self.query_scale * self.head_dim**0.5, query.dtype)
    if is_caching(self):
      key = _cached(self, 'key', key, start)  # [B, M, J, K]
      value = _cached(self, 'value', value, start)
    joined = attend(
      self,
      query,
      key,
      value,
      mask=seen,
      bias=bias,
      deterministic=deterministic,
      logit_cap=self.logit_cap,
    )
    return dense(x.shape[-1], use_bias=self.out_bias, name='out')(joined)


def grown(cache, length: int) -> bool:
  """Whether a cache made for `length` tokens has room for others, which a method added to them."""
  return any(
    leaf.shape[-1] != length
    for path, leaf in jax.tree.leaves_with_path(cache)
    if path[-1].key == 'texts'
  )


class LlamaBlock(Block):
  """Pre-norm attention and gated MLP; norms are RMSNorm. For the fields see `CausalAttention`.

  Attributes:
    kv_heads: None for as many as query heads.
    mlp_bias: whether the layers of the MLP have biases.
    branch_norms: whether what each branch adds to the stream is normalised too.
    window_rope: the rotary positions of blocks with a window; None for `rope`.
    experts: how experts of the width mlp_dim are chosen in place of one MLP; None for one.
  """

  activation: Callable[[jax.Array], jax.Array] = nn.silu
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  kv_heads: int | None = None
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  unit_norms: bool = False
  branch_norms: bool = False
  query_scale: float | None = None
  logit_cap: float | None = None
  rope: Rope = Rope()
  window_rope: Rope | None = None
  window: int | None = None
  experts: Experts | None = None

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    rope = self.rope
    if self.window is not None and self.window_rope is not None:
      rope = self.window_rope
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    dropout = nn.Dropout(self.dropout, name='dropout')
    attention = CausalAttention(
      self.heads,
      self.head_dim,
      kv_heads=self.kv_heads or self.heads,
      qkv_bias=self.qkv_bias,
      out_bias=self.out_bias,
      qk_norm=self.qk_norm,
      unit_norms=self.unit_norms,
      query_scale=self.query_scale,
      logit_cap=self.logit_cap,
      rope=rope,
      window=self.window,
      eps=self.eps,
      dropout=self.attention_dropout,
      attention_fn=self.attention_fn,
      name='attention',
      **types,
    )
    if self.experts is None:
      mlp = MLP(
        self.mlp_dim, self.activation, gated=True, use_bias=self.mlp_bias, name='mlp', **types
      )
    else:
      mlp = SparseMLP(self.mlp_dim, self.experts, self.activation, name='mlp', **types)

    def added(name, y):
      if self.branch_norms:
        y = rms_norm(self, name)(y)
      return dropout(y, deterministic=deterministic)

    y = attention(rms_norm(self, 'norm1')(x), mask=mask, bias=bias, deterministic=deterministic)
    x = x + added('branch_norm1', y)
    y = mlp(rms_norm(self, 'norm2')(x), deterministic=deterministic)
    return x + added('branch_norm2', y)


class Llama(nn.Module):
  """A decoder of text; called with tokens, it returns the logits of the token after each.

  It may have another head in place of that one, and read a text instead of writing one.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: query heads; a tuple has one number a block.
    mlp_dim: hidden width of the gated MLPs; a tuple has one number a block.
    vocab: number of words.
    kv_heads: key and value heads; None for as many as query heads; a tuple has one number a block.
    head_dim: size of a head; None for width / heads.
    tied: whether the logits of words come from the word table; else from a Dense `head`.
    num_classes: number of labels of a head that gives labels.
    head: 'text': logits [B, N, vocab] of the word after each token; 'classification': logits
      [B, num_classes] of the pooled feature; 'tokens': the same of each token; 'questions': logits
      [B, N, 2] that an answer starts and ends at a token. None for no head.
    pool: what a head of the pooled feature reads, or what is returned without a head: 'last' (the
      last token under the mask), 'mean' (of the tokens under the mask), or 'tokens' (all hidden
      states [B, N, D]).
    qkv_bias: whether query, key and value have a bias (Qwen2).
    out_bias: whether the output projection of attention has a bias.
    mlp_bias: whether the layers of the MLP have biases.
    qk_norm: whether each head of queries and keys is normalised (Qwen3, Gemma 3).
    unit_norms: whether norms multiply by 1 + scale, see `UnitRMSNorm` (Gemma).
    branch_norms: whether what each branch adds to the stream is normalised too (Gemma 2 and 3).
    embed_scale: what embedded words are multiplied by (Gemma); None for nothing.
    query_scale: what the logits of attention are multiplied by; None for 1 / sqrt(head_dim).
    logit_cap: the `soft_cap` of the logits of attention (Gemma 2); None for none.
    final_cap: the `soft_cap` of the logits of words (Gemma 2); None for none.
    rope: the rotary positions.
    window: a token sees itself and the window - 1 before it (Mistral); None for all before it; a
      tuple has one of both for each block (Gemma 2 and 3), and such blocks cannot be scanned.
    window_rope: the rotary positions of blocks with a window; None for `rope`.
    experts: how experts of the width mlp_dim are chosen in place of one MLP (Mixtral); None for
      one; a tuple has one of both for each block (Qwen3-MoE), and such blocks cannot be scanned.
    eps: of the norms.
    activation: of the MLPs.
    dropout: rate on what each branch adds to the stream.
    attention_dropout: rate on the attention probabilities.
    attention_fn: see `CausalAttention`.
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
  kv_heads: int | tuple[int, ...] | None = None
  head_dim: int | None = None
  tied: bool = False
  num_classes: int | None = None
  head: str | None = 'text'
  pool: str = 'last'
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  unit_norms: bool = False
  branch_norms: bool = False
  embed_scale: float | None = None
  query_scale: float | None = None
  logit_cap: float | None = None
  final_cap: float | None = None
  rope: Rope = Rope()
  window: int | tuple[int | None, ...] | None = None
  window_rope: Rope | None = None
  experts: Experts | tuple[Experts | None, ...] | None = None
  eps: float = 1e-6
  activation: Callable[[jax.Array], jax.Array] = nn.silu
  dropout: float = 0.0
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
    embed = WordTable(
      self.vocab,
      self.width,
      cap=self.final_cap,
      embedding_init=default_init,
      name='embed',
      **types,
    )
    block = block_of(
      self,
      LlamaBlock,
      kv_heads=self.kv_heads,
      qkv_bias=self.qkv_bias,
      out_bias=self.out_bias,
      mlp_bias=self.mlp_bias,
      qk_norm=self.qk_norm,
      unit_norms=self.unit_norms,
      branch_norms=self.branch_norms,
      query_scale=self.query_scale,
      logit_cap=self.logit_cap,
      rope=self.rope,
      window=self.window,
      window_rope=self.window_rope,
      experts=self.experts,
    )
    decoder = Encoder(block, self.depth, self.scan, self.remat, name='decoder')
    x = embed(tokens)
    if self.embed_scale is not None:
      x = x * jnp.asarray(self.embed_scale, x.dtype)
    x = decoder(x, mask=mask, deterministic=deterministic)  # [B, N, D]
    x = rms_norm(self, 'final_norm')(x)
    return read_out(self, head, x, mask, embed)
