"""ViT (arXiv:2010.11929) and its kin in one module.

DeiT (arXiv:2012.12877), DINOv2 (arXiv:2304.07193), with registers (arXiv:2309.16588), DINOv3
(arXiv:2508.10104), BEiT (arXiv:2106.08254), the encoder of ViT-MAE (arXiv:2111.06377), and the
towers of images of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import dot_product_attention

from ..nn import (
  Encoder,
  GridBias,
  GridRope,
  PreNormBlock,
  Remat,
  block_of,
  check_images,
  check_pool,
  default_init,
  gelu,
  grid,
  head_dim_of,
  layer_norm,
  shared_bias_heads,
)
from .pooling import AttentionPool

POOLS = ('cls', 'mean', 'cls_mean', 'attention', 'tokens')
POSITION_BIASES = (None, 'own', 'shared')


class PatchEmbed(nn.Module):
  """Images to tokens [(class,) (distillation,) (registers,) patches].

  Attributes:
    width: D of the tokens.
    patch_size: side of a patch in pixels.
    grid: rows and columns of patches.
    cls: whether there is a class token.
    distill: whether a distillation token follows the class token.
    registers: number of tokens without a position between the class token and the patches.
    mask_token: whether there is a token that stands for hidden patches.
    position: whether a learned position is added to each token.
    patch_bias: whether the layer that makes tokens of patches has a bias.
    dropout: rate on the tokens.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  patch_size: int
  grid: tuple[int, int]
  cls: bool = True
  distill: bool = False
  registers: int = 0
  mask_token: bool = False
  position: bool = True
  patch_bias: bool = True
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, masked=None, deterministic=True):
    """Returns tokens [B, N, D] of images [B, height, width, 3]; for `masked` see `ViT`."""
    patch = (self.patch_size, self.patch_size)
    patches = nn.Conv(
      self.width,
      kernel_size=patch,
      strides=patch,
      padding='VALID',
      use_bias=self.patch_bias,
      kernel_init=default_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='patch',
    )
    x = patches(images)  # [B, rows, columns, D]
    check_images(images, x.shape[1:3], self.grid, self.patch_size)
    x = rearrange(x, 'b r c d -> b (r c) d')

    def param(name, *shape):
      return self.param(name, default_init, shape, self.param_dtype)

    if self.mask_token:
      mask = param('mask', 1, self.width)
      if masked is not None:
        x = jnp.where(masked[..., None], mask.astype(x.dtype), x)
    # The order of the rows in the position table: class, distillation, patches.
    first = []
    if self.cls:
      first.append(param('cls', 1, 1, self.width))
    if self.distill:
      first.append(param('distill', 1, 1, self.width))
    tokens = [jnp.broadcast_to(token, (x.shape[0], 1, self.width)) for token in first]
    tokens = [token.astype(x.dtype) for token in tokens]
    x = jnp.concatenate([*tokens, x], 1)  # [B, N, D]
    if self.position:
      x = x + param('position', 1, x.shape[1], self.width).astype(x.dtype)
    if self.registers:
      registers = param('registers', 1, self.registers, self.width).astype(x.dtype)
      registers = jnp.broadcast_to(registers, (x.shape[0], self.registers, self.width))
      x = jnp.concatenate([x[:, : len(first)], registers, x[:, len(first) :]], 1)
    return nn.Dropout(self.dropout, name='dropout')(x, deterministic=deterministic)


class Same(nn.Module):
  """Its input: stands where others have a norm, so that the last hidden states have a name."""

  @nn.compact
  def __call__(self, x):
    return x


class ViT(nn.Module):
  """A vision transformer.

  Called with images [B, height, width, 3], normalised floats, it returns logits
  [B, num_classes], or the feature that a head would read when num_classes is None.

  Attributes:
    width: D of the residual stream.
    depth: number of blocks.
    heads: attention heads; a tuple has one number a block.
    mlp_dim: hidden width of the MLPs; a tuple has one number a block.
    patch_size: side of a patch in pixels.
    image_size: side of the images, or (height, width).
    num_classes: outputs of the head; None for no head.
    pool: what the head reads: 'cls', 'mean' (of the patches), 'cls_mean' (both, concatenated: 2D),
      'attention' (of a learned query to all tokens, see `AttentionPool`), or 'tokens' (all
      normalised tokens [B, N, D], no head).
    pool_mlp_dim: hidden width of the MLP of the pool 'attention'; None where there is none.
    pooler: whether tanh(Dense) follows the pooling, as in a bare ViTModel.
    cls: whether there is a class token. Without one the embedding is called `patches` in place of
      `embed`, from which naming schemes know how many tokens stand before the patches.
    distill: whether there is a distillation token (DeiT).
    distill_head: whether a second head reads it; the logits are then the mean of both.
    registers: number of register tokens, which no head reads (DINOv2 with registers).
    mask_token: whether the embedding has a token for hidden patches.
    position: whether the embedding adds a learned position to each token.
    patch_bias: whether the layer that makes tokens of patches has a bias.
    first_norm: whether a norm stands before the blocks (CLIP).
    rope_theta: the base of rotary positions of patches (DINOv3); None for none.
    position_bias: a learned logit for each distance of patches: 'own' of each block, or 'shared' by
      all (BEiT); None for none.
    bias_heads: for each block the heads of the shared position bias that its heads read; None for
      all in their order.
    last_norm: whether there is a last norm.
    norm_pooled: whether the last norm reads what is pooled in place of all tokens (BEiT, CLIP); all
      tokens, as pool='tokens' returns them, are then not normalised.
    layer_scale: initial value of the LayerScale of each branch, None for none.
    qkv_bias: whether query, key and value have a bias; three of them where they differ.
    out_bias: whether the output projection of attention has a bias.
    mlp_bias: whether the layers of the MLPs have biases.
    gated: whether the MLPs have a gate.
    head_dim: size of a head; None for width / heads.
    eps: of the norms.
    activation: of the MLPs.
    dropout: rate on the embedding and on each branch.
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
  patch_size: int
  image_size: int | tuple[int, int] = 224
  num_classes: int | None = None
  pool: str = 'cls'
  pool_mlp_dim: int | None = None
  pooler: bool = False
  cls: bool = True
  distill: bool = False
  distill_head: bool = False
  registers: int = 0
  mask_token: bool = False
  position: bool = True
  patch_bias: bool = True
  first_norm: bool = False
  rope_theta: float | None = None
  position_bias: str | None = None
  bias_heads: tuple[tuple[int, ...], ...] | None = None
  last_norm: bool = True
  norm_pooled: bool = False
  layer_scale: float | None = None
  qkv_bias: bool | tuple[bool, bool, bool] = True
  out_bias: bool = True
  mlp_bias: bool = True
  gated: bool = False
  head_dim: int | None = None
  eps: float = 1e-6
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, deterministic=True, masked=None):
    """Runs the model.

    Args:
      images: [B, height, width, 3], normalised.
      deterministic: no dropout.
      masked: boolean [B, patches], True where the mask token replaces a patch.

    Returns:
      Logits [B, num_classes], or the pooled feature.
    """
    check_pool(self.pool, POOLS, self.num_classes)
    if not self.cls and self.pool.startswith('cls'):
      raise ValueError(f"pool {self.pool!r} reads a class token, and there is none: choose 'mean'")
    if self.pool == 'attention' and self.pool_mlp_dim is None:
      raise ValueError("pool 'attention' reads a layer that this model has not: choose 'mean'")
    if self.position_bias not in POSITION_BIASES:
      known = ', '.join(map(repr, POSITION_BIASES))
      raise ValueError(f'position_bias {self.position_bias!r} is none of {known}')
    patches = grid(self.image_size, self.patch_size)
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = PatchEmbed(
      self.width,
      self.patch_size,
      patches,
      cls=self.cls,
      distill=self.distill,
      registers=self.registers,
      mask_token=self.mask_token,
      position=self.position,
      patch_bias=self.patch_bias,
      dropout=self.dropout,
      name='embed' if self.cls else 'patches',
      **types,
    )
    x = embed(images, masked=masked, deterministic=deterministic)  # [B, N, D]
    if self.first_norm:
      x = layer_norm(self, 'first_norm')(x)
    bias = functools.partial(GridBias, grid=patches, **types)
    block = block_of(
      self,
      PreNormBlock,
      qkv_bias=self.qkv_bias,
      out_bias=self.out_bias,
      mlp_bias=self.mlp_bias,
      gated=self.gated,
      layer_scale=self.layer_scale,
      rope=None if self.rope_theta is None else GridRope(patches, self.rope_theta),
      position_bias=bias if self.position_bias == 'own' else None,
      bias_heads=self.bias_heads,
    )
    shared = None
    if self.position_bias == 'shared':
      shared = functools.partial(bias, shared_bias_heads(self.heads, self.bias_heads, self.depth))
    encoder = Encoder(block, self.depth, self.scan, self.remat, shared, name='encoder')
    x = encoder(x, deterministic=deterministic)
    if self.last_norm and not self.norm_pooled:
      x = layer_norm(self, 'final_norm')(x)
    else:
      x = Same(name='final_norm')(x)
    feature = _feature(self, x)
    dense = functools.partial(nn.Dense, kernel_init=default_init, **types)
    if self.pooler:
      feature = jnp.tanh(dense(self.width, name='pooler')(feature))
    if self.num_classes is None:
      return feature
    logits = dense(self.num_classes, name='head')(feature)
    if self.distill_head:
      distilled = dense(self.num_classes, name='head_distill')(x[:, 1])  # its own token
      logits = (logits + distilled) / 2
    return logits


def _feature(model: ViT, tokens):
  """What the head of a model reads of all its tokens [B, N, D]; for `pool` see `ViT`."""
  feature = tokens
  first_patch = int(model.cls) + int(model.distill) + model.registers
  if model.pool in ('cls', 'cls_mean'):
    feature = tokens[:, 0]
  if model.pool in ('mean', 'cls_mean'):
    mean = tokens[:, first_patch:].mean(1)
    feature = mean if model.pool == 'mean' else jnp.concatenate([feature, mean], -1)
  if model.pool == 'attention':
    pool = AttentionPool(
      model.width // head_dim_of(model),
      model.pool_mlp_dim,
      model.activation,
      model.eps,
      model.attention_fn,
      model.dtype,
      model.param_dtype,
      name='attention_pool',
    )
    feature = pool(tokens)
  if model.last_norm and model.norm_pooled and model.pool != 'tokens':
    feature = layer_norm(model, 'pool_norm')(feature)
  return feature
