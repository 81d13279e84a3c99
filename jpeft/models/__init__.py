"""Real backbones as Linen modules, and their weights in the layout of Hugging Face."""

from .bert import Bert
from .blocks import PostNormBlock, PreNormBlock
from .llama import Llama, LlamaBlock
from .pretrained import (
  Pretrained,
  check_decoder,
  decoder_tokenizer,
  describe,
  from_config,
  load,
  save_pretrained,
)
from .t5 import T5, T5Block, shift_right
from .tokenizer import Tokenizer, load_tokenizer
from .vit import ViT

__all__ = [
  'T5', 'Bert', 'Llama', 'LlamaBlock', 'PostNormBlock', 'PreNormBlock', 'Pretrained', 'T5Block', 'Tokenizer',
  'ViT', 'check_decoder', 'decoder_tokenizer', 'describe', 'from_config', 'load', 'load_tokenizer',
  'save_pretrained', 'shift_right',
]
