"""Real backbones as Linen modules, and their weights in the layout of Hugging Face."""

from .bert.model import Bert
from .io.convert import keyed
from .io.layout import Place
from .io.safetensors import read_json, read_tensors, write_tensors
from .io.tokenizer import FILES, Tokenizer, load_tokenizer, save_tokenizer
from .llama.model import Llama, LlamaBlock, grown
from .load import (
  Pretrained,
  check_decoder,
  decoder_tokenizer,
  describe,
  family_of,
  from_config,
  load,
  save_pretrained,
  shapes_of,
)
from .nn.blocks import REMATS, Encoder, PostNormBlock, PreNormBlock, Remat, block_of
from .nn.layers import default_init, gelu_tanh, layer_norm
from .t5.model import T5, T5Block, shift_right
from .vit.model import ViT

__all__ = [
  'Bert',
  'Encoder',
  'FILES',
  'Llama',
  'LlamaBlock',
  'Place',
  'PostNormBlock',
  'PreNormBlock',
  'Pretrained',
  'REMATS',
  'Remat',
  'T5',
  'T5Block',
  'Tokenizer',
  'ViT',
  'block_of',
  'check_decoder',
  'decoder_tokenizer',
  'default_init',
  'describe',
  'family_of',
  'from_config',
  'gelu_tanh',
  'grown',
  'keyed',
  'layer_norm',
  'load',
  'load_tokenizer',
  'read_json',
  'read_tensors',
  'save_pretrained',
  'save_tokenizer',
  'shapes_of',
  'shift_right',
  'write_tensors',
]
