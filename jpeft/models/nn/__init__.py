"""What the backbones share: layers, blocks, positions."""

from .blocks import (
  REMATS,
  Encoder,
  Maker,
  PostNormBlock,
  PreNormBlock,
  Remat,
  block_of,
  by_block,
  head_dim_of,
  run_blocks,
)
from .layers import (
  MLP,
  Attention,
  Block,
  activation,
  attend,
  check_pool,
  default_init,
  gelu,
  gelu_tanh,
  layer_norm,
  rms_norm,
)
from .positions import PositionBias, resize_grid
from .rope import Rope

__all__ = [
  'Attention',
  'Block',
  'Encoder',
  'MLP',
  'Maker',
  'PositionBias',
  'PostNormBlock',
  'PreNormBlock',
  'REMATS',
  'Remat',
  'Rope',
  'activation',
  'attend',
  'block_of',
  'by_block',
  'check_pool',
  'default_init',
  'gelu',
  'gelu_tanh',
  'head_dim_of',
  'layer_norm',
  'resize_grid',
  'rms_norm',
  'run_blocks',
]
