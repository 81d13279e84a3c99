"""Weight files, tokenizers and where they come from."""

from .convert import from_files, keyed, to_tensors
from .gguf import GGUF_FILE, Gguf
from .layout import Place, Table
from .safetensors import (
  Checkpoint,
  has_weights,
  read_json,
  read_tensors,
  write_checkpoint,
  write_tensors,
)
from .sources import find
from .tokenizer import FILES, Tokenizer, load_tokenizer, save_tokenizer
from .vit_npz import NPZ_SUFFIX, VitNpz

__all__ = [
  'Checkpoint',
  'FILES',
  'GGUF_FILE',
  'Gguf',
  'NPZ_SUFFIX',
  'Place',
  'Table',
  'Tokenizer',
  'VitNpz',
  'find',
  'from_files',
  'has_weights',
  'keyed',
  'load_tokenizer',
  'read_json',
  'read_tensors',
  'save_tokenizer',
  'to_tensors',
  'write_checkpoint',
  'write_tensors',
]
