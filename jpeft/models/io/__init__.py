"""Weight files, tokenizers and where they come from."""

from .convert import from_files, keyed, to_tensors
from .gguf import Gguf
from .layout import Place, Table
from .safetensors import Checkpoint, read_json, read_tensors, write_tensors
from .sources import find
from .tokenizer import FILES, Tokenizer, load_tokenizer, save_tokenizer

__all__ = [
  'Checkpoint',
  'FILES',
  'Gguf',
  'Place',
  'Table',
  'Tokenizer',
  'find',
  'from_files',
  'keyed',
  'load_tokenizer',
  'read_json',
  'read_tensors',
  'save_tokenizer',
  'to_tensors',
  'write_tensors',
]
