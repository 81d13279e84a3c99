"""Real backbones as Linen modules, and their weights in the layout of Hugging Face.

Only the naming schemes are imported with the package; the backbones are imported on first use.
"""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

from . import naming as naming

if TYPE_CHECKING:
  from .bert import Bert
  from .convnext import ConvNeXt
  from .deberta import Deberta
  from .gpt import Gpt
  from .io import (
    FILES,
    Place,
    Tokenizer,
    keyed,
    load_tokenizer,
    read_json,
    read_tensors,
    save_tokenizer,
    write_tensors,
  )
  from .llama import Llama, LlamaBlock, grown
  from .modernbert import ModernBert
  from .narrow import (
    Keep,
    Pruned,
    cuts_anything,
    keep_of,
    narrowed,
    narrowed_theta,
    pruned,
    prunes,
    recovered,
    recovers,
    widened_theta,
  )
  from .nn import (
    REMATS,
    Encoder,
    PatchDecoder,
    PostNormBlock,
    PreNormBlock,
    Remat,
    block_of,
    default_init,
    gelu_tanh,
    layer_norm,
  )
  from .pretrained import (
    Pretrained,
    check_decoder,
    decoder_tokenizer,
    departure,
    describe,
    family_of,
    from_config,
    has_head,
    is_decoder,
    load,
    save_pretrained,
    shapes_of,
    untied,
  )
  from .swin import Swin
  from .t5 import T5, T5Block, shift_right
  from .vit import ViT

__all__ = [
  'Bert',
  'ConvNeXt',
  'Deberta',
  'Encoder',
  'FILES',
  'Gpt',
  'Keep',
  'Llama',
  'LlamaBlock',
  'ModernBert',
  'PatchDecoder',
  'Place',
  'PostNormBlock',
  'PreNormBlock',
  'Pretrained',
  'Pruned',
  'REMATS',
  'Remat',
  'Swin',
  'T5',
  'T5Block',
  'Tokenizer',
  'ViT',
  'block_of',
  'check_decoder',
  'cuts_anything',
  'decoder_tokenizer',
  'departure',
  'default_init',
  'describe',
  'family_of',
  'from_config',
  'gelu_tanh',
  'has_head',
  'grown',
  'is_decoder',
  'keep_of',
  'keyed',
  'layer_norm',
  'load',
  'load_tokenizer',
  'narrowed',
  'narrowed_theta',
  'pruned',
  'prunes',
  'read_json',
  'read_tensors',
  'recovered',
  'recovers',
  'save_pretrained',
  'save_tokenizer',
  'shapes_of',
  'shift_right',
  'untied',
  'widened_theta',
  'write_tensors',
]

__getattr__ = on_first_use(
  __name__,
  {
    '.bert': ('Bert',),
    '.convnext': ('ConvNeXt',),
    '.deberta': ('Deberta',),
    '.gpt': ('Gpt',),
    '.io': (
      'FILES',
      'Place',
      'Tokenizer',
      'keyed',
      'load_tokenizer',
      'read_json',
      'read_tensors',
      'save_tokenizer',
      'write_tensors',
    ),
    '.llama': ('Llama', 'LlamaBlock', 'grown'),
    '.modernbert': ('ModernBert',),
    '.narrow': (
      'Keep',
      'Pruned',
      'cuts_anything',
      'keep_of',
      'narrowed',
      'narrowed_theta',
      'pruned',
      'prunes',
      'recovered',
      'recovers',
      'widened_theta',
    ),
    '.nn': (
      'Encoder',
      'PatchDecoder',
      'PostNormBlock',
      'PreNormBlock',
      'REMATS',
      'Remat',
      'block_of',
      'default_init',
      'gelu_tanh',
      'layer_norm',
    ),
    '.pretrained': (
      'Pretrained',
      'check_decoder',
      'decoder_tokenizer',
      'departure',
      'describe',
      'family_of',
      'from_config',
      'has_head',
      'is_decoder',
      'load',
      'save_pretrained',
      'shapes_of',
      'untied',
    ),
    '.swin': ('Swin',),
    '.t5': ('T5', 'T5Block', 'shift_right'),
    '.vit': ('ViT',),
  },
)


def __dir__() -> list[str]:
  return __all__
