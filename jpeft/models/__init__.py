"""Real backbones as Linen modules, and their weights in the layout of Hugging Face.

Only the naming schemes are imported with the package, the backbones when they are first used.
"""

from typing import TYPE_CHECKING

from . import naming as naming
from .lazy import on_first_use

if TYPE_CHECKING:
  from .bert import Bert
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
  from .nn import (
    REMATS,
    Encoder,
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
    describe,
    family_of,
    from_config,
    load,
    save_pretrained,
    shapes_of,
  )
  from .t5 import T5, T5Block, shift_right
  from .vit import ViT

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

_MODULES = {
  'Bert': '.bert',
  'Encoder': '.nn',
  'FILES': '.io',
  'Llama': '.llama',
  'LlamaBlock': '.llama',
  'Place': '.io',
  'PostNormBlock': '.nn',
  'PreNormBlock': '.nn',
  'Pretrained': '.pretrained',
  'REMATS': '.nn',
  'Remat': '.nn',
  'T5': '.t5',
  'T5Block': '.t5',
  'Tokenizer': '.io',
  'ViT': '.vit',
  'block_of': '.nn',
  'check_decoder': '.pretrained',
  'decoder_tokenizer': '.pretrained',
  'default_init': '.nn',
  'describe': '.pretrained',
  'family_of': '.pretrained',
  'from_config': '.pretrained',
  'gelu_tanh': '.nn',
  'grown': '.llama',
  'keyed': '.io',
  'layer_norm': '.nn',
  'load': '.pretrained',
  'load_tokenizer': '.io',
  'read_json': '.io',
  'read_tensors': '.io',
  'save_pretrained': '.pretrained',
  'save_tokenizer': '.io',
  'shapes_of': '.pretrained',
  'shift_right': '.t5',
  'write_tensors': '.io',
}

__getattr__ = on_first_use(__name__, _MODULES)


def __dir__() -> list[str]:
  return __all__
