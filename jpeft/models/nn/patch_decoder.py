"""The decoder of MAE (arXiv:2111.06377): pixels of all patches from the tokens of some."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import dot_product_attention

from .blocks import Encoder, PreNormBlock, block_of
from .layers import default_init, gelu, layer_norm


class PatchDecoder(nn.Module):
  """Tokens [B, L + n, D], L of no patch and n of patches, to [B, N, outputs] of all N patches.

  A learned token stands in the places without a token, and each patch has a fixed position of
  sines and cosines.

  Attributes:
    width: of the decoder, divisible by 4 and by `heads`.
    depth: number of blocks.
    heads: attention heads.
    grid: rows and columns of patches, N in all.
    outputs: numbers of a patch.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  depth: int
  heads: int
  grid: tuple[int, int]
  outputs: int
  eps: float = 1e-6
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @property
  def mlp_dim(self) -> int:
    """Hidden width of the MLPs."""
    return 4 * self.width

  @nn.compact
  def __call__(self, tokens, shown):
    """Returns [B, N, outputs].

    Args:
      tokens: [B, L + n, D], those of no patch first.
      shown: [B, n] integers, the patch that each of the others is of.
    """
    rows, columns = self.grid
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    x = nn.Dense(self.width, kernel_init=default_init, name='embed', **types)(tokens)
    lead = x.shape[1] - shown.shape[1]
    mask = self.param('mask', default_init, (1, 1, self.width), self.param_dtype)
    whole = jnp.broadcast_to(mask.astype(x.dtype), (len(x), rows * columns, self.width))
    place = jnp.arange(len(x))[:, None]
    patches = whole.at[place, shown].set(x[:, lead:])
    patches = patches + positions(rows, columns, self.width).astype(x.dtype)
    x = jnp.concatenate([x[:, :lead], patches], 1)
    block = block_of(self, PreNormBlock)
    x = Encoder(block, self.depth, name='encoder')(x)
    x = layer_norm(self, 'final_norm')(x[:, lead:])
    return nn.Dense(self.outputs, kernel_init=default_init, name='pixels', **types)(x)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
  """Sines and cosines of the row and of the column of each patch, [rows * columns, width]."""
  quarter = width // 4
  waves = 10_000.0 ** (-np.arange(quarter) / quarter)
  row, column = np.divmod(np.arange(rows * columns), columns)
  angles = [number[:, None] * waves for number in (row, column)]
  parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(parts, 1).astype(np.float32)
