"""The embedding of text encoders whose attention alone knows of places."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .layers import default_init, layer_norm


class WordEmbed(nn.Module):
  """Embedded words, normalised; nothing tells them their places.

  Attributes:
    width: D.
    vocab: number of words.
    eps: of the norm.
    norm_bias: whether the norm has a bias.
    dropout: rate on the result.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  vocab: int
  eps: float
  norm_bias: bool = True
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    self.word = nn.Embed(self.vocab, self.width, embedding_init=default_init, **types)
    self.norm = layer_norm(self)
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, tokens, deterministic=True):
    return self.drop(self.norm(self.word(tokens)), deterministic=deterministic)
