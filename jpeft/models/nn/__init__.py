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
from .heads import HEADS, WordBias, head_of, last_token, masked_mean, outputs_of
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
  'HEADS',
  'MLP',
  'Maker',
  'PositionBias',
  'PostNormBlock',
  'PreNormBlock',
  'REMATS',
  'Remat',
  'Rope',
  'WordBias',
  'activation',
  'attend',
  'block_of',
  'by_block',
  'check_pool',
  'default_init',
  'gelu',
  'gelu_tanh',
  'head_dim_of',
  'head_of',
  'last_token',
  'layer_norm',
  'masked_mean',
  'outputs_of',
  'resize_grid',
  'rms_norm',
  'run_blocks',
]
