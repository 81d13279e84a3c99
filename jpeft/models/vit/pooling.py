"""The pooling of SigLIP (arXiv:2303.15343): a learned query attends to all tokens."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import dot_product_attention

from ..nn import MLP, default_init, gelu_tanh, layer_norm


class FusedAttention(nn.Module):
  """Attention of one query to tokens, whose three projections are one layer as files have it.

  Attributes:
    heads: number of heads.
    attention_fn: see `jpeft.models.nn.Attention`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  heads: int
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, query, tokens):
    """Returns [B, 1, D] of a query [B, 1, D] and tokens [B, N, D]."""

    def dense(width, name):
      return nn.Dense(
        width,
        kernel_init=default_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    width = tokens.shape[-1]
    # One call, since a layer that is called twice is one site with two inputs.
    projected = dense(3 * width, 'qkv')(jnp.concatenate([query, tokens], 1))  # [B, 1 + N, 3D]
    split = rearrange(projected, 'b n (c h k) -> c b n h k', c=3, h=self.heads)
    attended = self.attention_fn(
      split[0][:, :1], split[1][:, 1:], split[2][:, 1:], dtype=self.dtype
    )  # [B, 1, H, K]
    return dense(width, 'out')(rearrange(attended, 'b n h k -> b n (h k)'))


class AttentionPool(nn.Module):
  """y + mlp(norm(y)), where y is the attention of a learned query to the tokens.

  Attributes:
    heads: number of attention heads.
    mlp_dim: hidden width of the MLP.
    activation: of the MLP.
    eps: of the norm.
    attention_fn: see `jpeft.models.nn.Attention`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  heads: int
  mlp_dim: int
  activation: Callable[[jax.Array], jax.Array] = gelu_tanh
  eps: float = 1e-6
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens):
    """Returns the feature [B, D] of tokens [B, N, D]."""
    batch, _, width = tokens.shape
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    query = self.param('query', default_init, (1, 1, width), self.param_dtype)
    query = jnp.broadcast_to(query, (batch, 1, width)).astype(tokens.dtype)
    attention = FusedAttention(self.heads, self.attention_fn, name='attention', **types)
    x = attention(query, tokens)  # [B, 1, D]
    mlp = MLP(self.mlp_dim, self.activation, name='mlp', **types)
    return (x + mlp(layer_norm(self, 'norm')(x)))[:, 0]
