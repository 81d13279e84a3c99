"""ConvNeXt (arXiv:2201.03545) and ConvNeXt V2 (arXiv:2301.00808): blocks of a depthwise
convolution and an MLP, in stages that halve the rows and columns.

Axes: B images, H rows, W columns, D channels.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from ..nn import (
  MLP,
  LayerScale,
  Maker,
  Remat,
  Stages,
  check_pool,
  default_init,
  gelu,
  layer_norm,
  run_blocks,
)

POOLS = ('mean', 'tokens')
_EPS = 1e-6  # of all norms but the last


class ResponseNorm(nn.Module):
  """x + scale * (x * share) + bias: global response normalisation (arXiv:2301.00808).

  The share of a channel is its norm over rows and columns, relative to the mean of all channels.
  """

  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Returns an array like x [B, H, W, D]."""
    init = nn.initializers.zeros
    scale = self.param('scale', init, (x.shape[-1],), self.param_dtype).astype(self.dtype)
    bias = self.param('bias', init, (x.shape[-1],), self.param_dtype).astype(self.dtype)
    squares = jnp.square(x.astype(jnp.float32)).sum((1, 2), keepdims=True)  # [B, 1, 1, D]
    norm = jnp.sqrt(squares)
    share = (norm / (norm.mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)
    return x + scale * (x * share) + bias


class Downsample(nn.Module):
  """A convolution of squares that do not overlap, beside a norm.

  Attributes:
    width: channels that it returns.
    side: of a square.
    conv: name of the convolution.
    norm_first: whether the norm reads the input, and not what the convolution returns.
    eps: of the norm.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  width: int
  side: int
  conv: str
  norm_first: bool
  eps: float = _EPS
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Returns [B, H / side, W / side, width]; rows and columns that fill no square are dropped."""
    conv = nn.Conv(
      self.width,
      kernel_size=(self.side, self.side),
      strides=(self.side, self.side),
      padding='VALID',
      kernel_init=default_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=self.conv,
    )
    norm = layer_norm(self, 'norm')
    return conv(norm(x)) if self.norm_first else norm(conv(x))


class ConvBlock(nn.Module):
  """x + scale * mlp(norm(depthwise(x))).

  Attributes:
    activation: of the MLP.
    layer_scale: initial value of the scale; None for none.
    response_norm: whether the hidden layer of the MLP has a `ResponseNorm`.
    dropout: rate on what the block adds.
    eps: of the norm.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  activation: Callable[[jax.Array], jax.Array] = gelu
  layer_scale: float | None = None
  response_norm: bool = False
  dropout: float = 0.0
  eps: float = _EPS
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, deterministic=True):
    """Returns an array like x [B, H, W, D]."""
    width = x.shape[-1]
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    depthwise = nn.Conv(
      width,
      kernel_size=(7, 7),
      feature_group_count=width,
      kernel_init=default_init,
      name='depthwise',
      **types,
    )
    hidden_norm = functools.partial(ResponseNorm, **types) if self.response_norm else None
    mlp = MLP(4 * width, self.activation, hidden_norm=hidden_norm, name='mlp', **types)
    y = mlp(layer_norm(self, 'norm')(depthwise(x)), deterministic=deterministic)
    if self.layer_scale is not None:
      y = LayerScale(self.layer_scale, name='scale', **types)(y)
    return x + nn.Dropout(self.dropout, name='dropout')(y, deterministic=deterministic)


class ConvStage(nn.Module):
  """Blocks of one width, and what reads the stage before.

  Attributes:
    merge: makes a `Downsample`; None in the first stage.
    block: makes a block.
    depth: number of blocks.
    scan: see `run_blocks`.
    remat: see `run_blocks`.
  """

  merge: Maker | None
  block: Maker
  depth: int
  scan: bool = False
  remat: Remat = False

  @nn.compact
  def __call__(self, x, deterministic=True):
    if self.merge is not None:
      x = self.merge(name='merge')(x)
    return run_blocks(
      self.block,
      self.depth,
      x,
      scan=self.scan,
      remat=self.remat,
      deterministic=deterministic,
    )


class ConvNeXt(nn.Module):
  """A ConvNeXt.

  Called with images [B, height, width, 3], normalised floats, it returns logits
  [B, num_classes], or the feature that a head would read when num_classes is None.

  Attributes:
    widths: D of each stage.
    depths: number of blocks of each stage.
    patch_size: side of a patch in pixels.
    image_size: side of the images that it is meant for, or (height, width); it takes others too.
    num_classes: outputs of the head; None for no head.
    pool: what the head reads: 'mean', the normalised mean over rows and columns, or 'tokens' (all
      of them [B, N, D], not normalised; no head).
    response_norm: whether the MLPs have a `ResponseNorm` (V2).
    layer_scale: initial value of the LayerScale of each block, None for none.
    eps: of the last norm.
    activation: of the MLPs.
    dropout: rate on what each block adds.
    scan: run the blocks of each stage by nn.scan.
    remat: recompute blocks in the backward pass; see `run_blocks`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  widths: tuple[int, ...]
  depths: tuple[int, ...]
  patch_size: int = 4
  image_size: int | tuple[int, int] = 224
  num_classes: int | None = None
  pool: str = 'mean'
  response_norm: bool = False
  layer_scale: float | None = None
  eps: float = 1e-12
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, deterministic=True):
    """Returns logits [B, num_classes], or the pooled feature, of images [B, height, width, 3]."""
    check_pool(self.pool, POOLS, self.num_classes)
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    embed = Downsample(self.widths[0], self.patch_size, 'patch', False, name='embed', **types)
    x = Stages(self._stages(), name='encoder')(embed(images), deterministic=deterministic)
    if self.pool == 'tokens':
      return rearrange(x, 'b h w d -> b (h w) d')
    feature = layer_norm(self, 'final_norm')(x.mean((1, 2)))
    if self.num_classes is None:
      return feature
    return nn.Dense(self.num_classes, kernel_init=default_init, name='head', **types)(feature)

  @nn.nowrap
  def _stages(self) -> tuple[Maker, ...]:
    """Makers of the stages."""
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    block = functools.partial(
      ConvBlock,
      self.activation,
      self.layer_scale,
      self.response_norm,
      self.dropout,
      **types,
    )
    makers = []
    for i, depth in enumerate(self.depths):
      merge = None
      if i:
        merge = functools.partial(Downsample, self.widths[i], 2, 'reduction', True, **types)
      makers.append(functools.partial(ConvStage, merge, block, depth, self.scan, self.remat))
    return tuple(makers)
