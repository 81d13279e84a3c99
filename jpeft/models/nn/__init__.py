"""What the backbones share: layers, blocks, positions."""

from .blocks import (
  Encoder,
  Maker,
  PostNormBlock,
  PreNormBlock,
  block_of,
  by_block,
  head_dim_of,
  run_blocks,
  shared_bias_heads,
)
from .heads import HEADS, WordBias, head_of, last_token, masked_mean, outputs_of
from .images import check_images, grid, image_example, image_size_of, patch_size_of, size_in_config
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
from .patch_decoder import PatchDecoder
from .positions import (
  GridBias,
  PositionBias,
  bias_of_heads,
  resize_distances,
  resize_grid,
)
from .recompute import REMATS, Remat
from .rope import GridRope, Rope
from .windows import WindowBias, Windows

__all__ = [
  'Attention',
  'Block',
  'Encoder',
  'GridBias',
  'GridRope',
  'HEADS',
  'MLP',
  'Maker',
  'PatchDecoder',
  'PositionBias',
  'PostNormBlock',
  'PreNormBlock',
  'REMATS',
  'Remat',
  'Rope',
  'WindowBias',
  'Windows',
  'WordBias',
  'activation',
  'attend',
  'bias_of_heads',
  'block_of',
  'by_block',
  'check_images',
  'check_pool',
  'default_init',
  'gelu',
  'gelu_tanh',
  'grid',
  'head_dim_of',
  'head_of',
  'image_example',
  'image_size_of',
  'last_token',
  'layer_norm',
  'masked_mean',
  'outputs_of',
  'patch_size_of',
  'resize_distances',
  'resize_grid',
  'rms_norm',
  'run_blocks',
  'shared_bias_heads',
  'size_in_config',
]
