"""Llama, Mistral, SmolLM2, Qwen2 and Qwen3."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import LLAMA_FAMILIES
  from .model import Llama, LlamaBlock, grown
  from .sizes import LLAMA_SIZES

__all__ = ['LLAMA_FAMILIES', 'LLAMA_SIZES', 'Llama', 'LlamaBlock', 'grown']

__getattr__ = on_first_use(
  __name__,
  {
    '.files': ('LLAMA_FAMILIES',),
    '.model': ('Llama', 'LlamaBlock', 'grown'),
    '.sizes': ('LLAMA_SIZES',),
  },
)


def __dir__() -> list[str]:
  return __all__
