"""Decoders of the Llama family (arXiv:2302.13971): Llama, Mistral, SmolLM2, Qwen2, Qwen3.

Axes: B batch, N tokens, M tokens so far, H query heads, J key and value heads, K head size, D
  width.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..nn.blocks import Encoder, Remat, block_of
from ..nn.layers import MLP, Block, default_init, rms_norm
from ..nn.rope import Rope


def grouped_attention(query, key, value, bias=None, mask=None, *, dropout_rng=None, **options):
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
  heads = key.shape[-2]
  grouped = query.reshape(*query.shape[:-2], heads, query.shape[-2] // heads, query.shape[-1])
  rngs = None if dropout_rng is None else jax.random.split(dropout_rng, grouped.shape[-2])

  def attend(query, rng):
    return nn.dot_product_attention(
      query, key, value, bias=bias, mask=mask, dropout_rng=rng, **options
    )

  out = jax.vmap(attend, in_axes=(-2, None if rngs is None else 0), out_axes=-2)(grouped, rngs)
  return out.reshape(query.shape)


class CausalAttention(nn.Module):
  """Self-attention of tokens to those before them, with rotary positions and a cache.

  Called with the collection 'cache' mutable, it keeps its keys and values there: the first call
  makes room for as many tokens as it is called with, later ones put theirs behind those that are
  held.

  Attributes:
    heads: query heads H.
    head_dim: size of a head K; heads * head_dim may differ from the width of the input.
    kv_heads: key and value heads J.
    qkv_bias: whether query, key and value have a bias.
    out_bias: whether the output projection has a bias.
    qk_norm: whether queries and keys are normalised a head (RMSNorm), before the rotation.
    rope: the rotary positions.
    window: a token sees itself and the window - 1 before it; None for all before it.
    eps: of the norms.
    dropout: rate on the attention probabilities.
    attention_fn: called as `grouped_attention`, with J heads of keys and values.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  heads: int
  head_dim: int
  kv_heads: int
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False
  rope: Rope = Rope()
  window: int | None = None
  eps: float = 1e-6
  dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = grouped_attention
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    """x [B, N, D] and mask [B, N], see `Llama`, to [B, N, D]."""
    dense = functools.partial(
      nn.Dense, kernel_init=default_init, dtype=self.dtype, param_dtype=self.param_dtype
    )

    def heads(name, count, norm):
      y = dense(count * self.head_dim, use_bias=self.qkv_bias, name=name)(x)
      y = y.reshape(*y.shape[:-1], count, self.head_dim)
      return rms_norm(self, f'{name}_norm')(y) if norm else y

    query = heads('query', self.heads, self.qk_norm)
    key = heads('key', self.kv_heads, self.qk_norm)
    value = heads('value', self.kv_heads, False)
    start = self.get_variable('cache', 'length', 0)
    places = start + jnp.arange(x.shape[1])  # in the row
    own = texts = None if mask is None else mask.astype(jnp.int32)
    keeps = self.is_mutable_collection('cache') and not self.is_initializing()
    if keeps:
      own = jnp.ones(x.shape[:2], jnp.int32) if own is None else own
      texts = self._kept('texts', own, start)
    seen, positions = (
      (places[:, None] >= jnp.arange((x if texts is None else texts).shape[1]))[None],
      places,
    )
    if texts is not None:
      seen = seen & (own[:, :, None] == texts[:, None])
      positions = seen.sum(-1) - 1  # in its text
    query, key = self.rope.rotate(query, positions), self.rope.rotate(key, positions)
    if keeps:
      key, value = self._kept('key', key, start), self._kept('value', value, start)
      self.put_variable('cache', 'length', jnp.asarray(start + x.shape[1], jnp.int32))
    if self.window is not None:
      seen = seen & (places[:, None] - jnp.arange(seen.shape[-1]) < self.window)
    seen = seen[:, None]
    drop = self.dropout > 0 and not deterministic
    out = self.attention_fn(
      query,
      key,
      value,
      bias=bias,
      mask=seen,
      broadcast_dropout=False,
      dropout_rng=self.make_rng('dropout') if drop else None,
      dropout_rate=self.dropout if drop else 0.0,
      deterministic=not drop,
      dtype=self.dtype,
    )
    out = out.reshape(*out.shape[:-2], self.heads * self.head_dim)
    return dense(x.shape[-1], use_bias=self.out_bias, name='out')(out)

  def _kept(self, name, new, start):
    """What the cache holds under a name, `new` put behind the `start` tokens that came before."""
    room = self.get_variable('cache', name, jnp.zeros_like(new))
    held = jax.lax.dynamic_update_slice_in_dim(room, new.astype(room.dtype), start, axis=1)
    self.put_variable('cache', name, held)
    return held


def grown(cache, length: int) -> bool:
  """Whether a cache made for `length` tokens holds others too, which a method has added to the
  sequence.
  """
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
  """

  activation: Callable[[jax.Array], jax.Array] = nn.silu
  attention_fn: Callable[..., jax.Array] = grouped_attention
  kv_heads: int | None = None
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  rope: Rope = Rope()
  window: int | None = None

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    dropout = nn.Dropout(self.dropout, name='dropout')
    attention = CausalAttention(
      self.heads,
      self.head_dim,
      self.kv_heads or self.heads,
      self.qkv_bias,
      self.out_bias,
      self.qk_norm,
      self.rope,
      self.window,
      self.eps,
      self.attention_dropout,
      self.attention_fn,
      name='attention',
      **types,
    )
    mlp = MLP(
      self.mlp_dim, self.activation, gated=True, use_bias=self.mlp_bias, name='mlp', **types
    )
    y = attention(rms_norm(self, 'norm1')(x), mask=mask, bias=bias, deterministic=deterministic)
    x = x + dropout(y, deterministic=deterministic)
    y = mlp(rms_norm(self, 'norm2')(x), deterministic=deterministic)
    return x + dropout(y, deterministic=deterministic)


class Llama(nn.Module):
  """A decoder of text; called with tokens, it returns the logits of the token after each.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: query heads.
    mlp_dim: hidden width of the gated MLPs.
    vocab: number of words.
    kv_heads: key and value heads; None for as many as query heads.
    head_dim: size of a head; None for width / heads.
    tied: whether the logits come from the word table; else from a Dense `head`.
    qkv_bias: whether query, key and value have a bias (Qwen2).
    out_bias: whether the output projection of attention has a bias.
    mlp_bias: whether the layers of the MLP have biases.
    qk_norm: whether queries and keys are normalised a head (Qwen3).
    rope: the rotary positions.
    window: a token sees itself and the window - 1 before it (Mistral); None for all before it.
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
  heads: int
  mlp_dim: int
  vocab: int
  kv_heads: int | None = None
  head_dim: int | None = None
  tied: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  rope: Rope = Rope()
  window: int | None = None
  eps: float = 1e-6
  activation: Callable[[jax.Array], jax.Array] = nn.silu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = grouped_attention
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, mask=None, deterministic=True):
    """Runs the model. With the collection 'cache' mutable it goes on from what that holds.

    Args:
      tokens: word ids [B, N].
      mask: [B, N]: 0 for padding, which may stand before the text as well as behind it. A row that
        packs several texts numbers them 1, 2, ...: a token sees those of its own number, and its
        position is counted among them. None for one text.
      deterministic: no dropout.

    Returns:
      Logits [B, N, vocab].
    """
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = nn.Embed(self.vocab, self.width, embedding_init=default_init, name='embed', **types)
    own = ('kv_heads', 'qkv_bias', 'out_bias', 'mlp_bias', 'qk_norm', 'rope', 'window')
    block = block_of(
      self,
      LlamaBlock,
      head_dim=self.head_dim or self.width // self.heads,
      **{name: getattr(self, name) for name in own},
    )
    x = Encoder(block, self.depth, self.scan, self.remat, name='decoder')(
      embed(tokens), mask=mask, deterministic=deterministic
    )
    x = rms_norm(self, 'final_norm')(x)
    if self.tied:
      return embed.attend(x)
    return nn.Dense(self.vocab, use_bias=False, kernel_init=default_init, name='head', **types)(x)
