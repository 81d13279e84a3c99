"""Swin (arXiv:2103.14030): blocks that attend within windows, in stages that merge patches."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import dot_product_attention

from ..nn import (
  Maker,
  PreNormBlock,
  Remat,
  Stages,
  WindowBias,
  Windows,
  check_images,
  check_pool,
  default_init,
  gelu,
  grid,
  layer_norm,
  run_blocks,
)

POOLS = ('mean', 'tokens')
_EPS = 1e-5  # of the norms outside of blocks, whatever the config says


class WindowedEmbed(nn.Module):
  """Images to normalised tokens of patches [B, N, D].

  Attributes:
    width: D of the tokens.
    patch_size: side of a patch in pixels.
    grid: rows and columns of patches.
    position: whether a learned position is added to each token.
    dropout: rate on the tokens.
    eps: of the norm.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  patch_size: int
  grid: tuple[int, int]
  position: bool = False
  dropout: float = 0.0
  eps: float = _EPS
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, deterministic=True):
    patch = (self.patch_size, self.patch_size)
    patches = nn.Conv(
      self.width,
      kernel_size=patch,
      strides=patch,
      padding='VALID',
      kernel_init=default_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='patch',
    )
    x = patches(images)  # [B, rows, columns, D]
    check_images(images, x.shape[1:3], self.grid, self.patch_size)
    x = layer_norm(self, 'norm')(rearrange(x, 'b r c d -> b (r c) d'))
    if self.position:
      shape = (1, x.shape[1], self.width)
      x = x + self.param('position', default_init, shape, self.param_dtype).astype(x.dtype)
    return nn.Dropout(self.dropout, name='dropout')(x, deterministic=deterministic)


class PatchMerge(nn.Module):
  """Half as many rows and columns of tokens, twice as wide: reduction(norm(four neighbours)).

  Attributes:
    grid: rows and columns of tokens; a row or column of zeros follows an odd number of them.
    eps: of the norm.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  grid: tuple[int, int]
  eps: float = _EPS
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Returns [B, N / 4, 2D] of x [B, N, D]."""
    rows, columns = self.grid
    width = x.shape[-1]
    x = rearrange(x, 'b (r c) d -> b r c d', r=rows)
    x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
    # Of the four, the left ones come first, from above.
    x = rearrange(x, 'b (r y) (c x) d -> b (r c) (x y d)', y=2, x=2)
    reduction = nn.Dense(
      2 * width,
      use_bias=False,
      kernel_init=default_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='reduction',
    )
    return reduction(layer_norm(self, 'norm')(x))


class Stage(nn.Module):
  """Blocks of one width, and what merges patches after them.

  Attributes:
    blocks: makers of the blocks.
    merge: makes a `PatchMerge`; None in the last stage.
    remat: see `run_blocks`.
  """

  blocks: tuple[Maker, ...]
  merge: Maker | None
  remat: Remat = False

  @nn.compact
  def __call__(self, x, deterministic=True):
    x = run_blocks(self.blocks, len(self.blocks), x, remat=self.remat, deterministic=deterministic)
    if self.merge is None:
      return x
    return self.merge(name='merge')(x)


class Swin(nn.Module):
  """A Swin transformer.

  Called with images [B, height, width, 3], normalised floats, it returns logits
  [B, num_classes], or the feature that a head would read when num_classes is None. Every second
  block has shifted windows, so that no scan can run them.

  Attributes:
    width: D of the first stage; each stage is twice as wide as the one before.
    depths: number of blocks of each stage.
    heads: attention heads of each stage.
    window: rows and columns of a window.
    patch_size: side of a patch in pixels.
    image_size: side of the images, or (height, width).
    mlp_ratio: hidden width of the MLPs, as a multiple of that of the stage.
    num_classes: outputs of the head; None for no head.
    pool: what the head reads: 'mean' of the tokens, or 'tokens' (all of them, no head).
    position: whether the embedding adds a learned position to each token.
    qkv_bias: whether query, key and value have a bias.
    eps: of the norms in blocks, and of the last one.
    activation: of the MLPs.
    dropout: rate on the embedding and on each branch.
    attention_dropout: rate on the attention probabilities.
    attention_fn: see `jpeft.models.nn.Attention`.
    scan: must be False.
    remat: recompute blocks in the backward pass; see `run_blocks`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  depths: tuple[int, ...]
  heads: tuple[int, ...]
  window: int
  patch_size: int = 4
  image_size: int | tuple[int, int] = 224
  mlp_ratio: float = 4.0
  num_classes: int | None = None
  pool: str = 'mean'
  position: bool = False
  qkv_bias: bool = True
  eps: float = 1e-5
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, deterministic=True):
    """Returns logits [B, num_classes], or the pooled feature, of images [B, height, width, 3]."""
    check_pool(self.pool, POOLS, self.num_classes)
    if self.scan:
      raise ValueError(
        'scan=True runs one program for all blocks, and every second block of a Swin has shifted '
        'windows: use scan=False'
      )
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    patches = grid(self.image_size, self.patch_size)
    embed = WindowedEmbed(
      self.width,
      self.patch_size,
      patches,
      position=self.position,
      dropout=self.dropout,
      name='embed',
      **types,
    )
    x = embed(images, deterministic=deterministic)  # [B, N, D]
    x = Stages(self._stages(patches), name='encoder')(x, deterministic=deterministic)
    x = layer_norm(self, 'final_norm')(x)
    if self.pool == 'tokens':
      return x
    feature = x.mean(1)
    if self.num_classes is None:
      return feature
    return nn.Dense(self.num_classes, kernel_init=default_init, name='head', **types)(feature)

  @nn.nowrap
  def _stages(self, patches: tuple[int, int]) -> tuple[Maker, ...]:
    """Makers of the stages, the first of which reads a grid of so many rows and columns."""
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    makers = []
    for i, depth in enumerate(self.depths):
      blocks = tuple(self._block(i, patches, is_shifted=j % 2 == 1) for j in range(depth))
      merge = None
      if i < len(self.depths) - 1:
        merge = functools.partial(PatchMerge, patches, **types)
      makers.append(functools.partial(Stage, blocks, merge, self.remat))
      patches = (patches[0] + 1) // 2, (patches[1] + 1) // 2
    return tuple(makers)

  @nn.nowrap
  def _block(self, stage: int, patches: tuple[int, int], is_shifted: bool) -> Maker:
    """A maker of blocks of a stage."""
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    width = self.width * 2**stage
    # A single window has nothing to be shifted against.
    shift = self.window // 2 if is_shifted and min(patches) > self.window else 0
    return functools.partial(
      PreNormBlock,
      self.heads[stage],
      width // self.heads[stage],
      int(self.mlp_ratio * width),
      eps=self.eps,
      activation=self.activation,
      dropout=self.dropout,
      attention_dropout=self.attention_dropout,
      attention_fn=self.attention_fn,
      qkv_bias=self.qkv_bias,
      windows=Windows(patches, self.window, shift),
      position_bias=functools.partial(WindowBias, side=self.window, **types),
      **types,
    )
