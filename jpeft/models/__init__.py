"""Real backbones as Linen modules, and their weights in the layout of Hugging Face."""

from .bert import Bert
from .pretrained import Pretrained, from_config, load, save_pretrained
from .t5 import T5, shift_right
from .vit import ViT

__all__ = ['Bert', 'Pretrained', 'T5', 'ViT', 'from_config', 'load', 'save_pretrained', 'shift_right']
