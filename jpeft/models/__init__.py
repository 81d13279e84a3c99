"""Real backbones as Linen modules, and their weights in the layout of Hugging Face."""

from .bert import Bert
from .blocks import PostNormBlock, PreNormBlock
from .pretrained import Pretrained, describe, from_config, load, save_pretrained
from .t5 import T5, T5Block, shift_right
from .vit import ViT

__all__ = [
  'T5', 'Bert', 'PostNormBlock', 'PreNormBlock', 'Pretrained', 'T5Block', 'ViT', 'describe', 'from_config',
  'load', 'save_pretrained', 'shift_right',
]
