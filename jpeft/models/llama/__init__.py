"""Llama, Mistral, SmolLM2, Qwen2, Qwen3, Phi-3 and the Gemmas."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import LLAMA_FAMILIES
  from .model import CausalAttention, Llama, LlamaBlock, grown, positions_in, seen_tokens
  from .sizes import LLAMA_SIZES

__all__ = [
  'CausalAttention',
  'LLAMA_FAMILIES',
  'LLAMA_SIZES',
  'Llama',
  'LlamaBlock',
  'grown',
  'positions_in',
  'seen_tokens',
]

__getattr__ = on_first_use(
  __name__,
  {
    '.files': ('LLAMA_FAMILIES',),
    '.model': (
      'CausalAttention',
      'Llama',
      'LlamaBlock',
      'grown',
      'positions_in',
      'seen_tokens',
    ),
    '.sizes': ('LLAMA_SIZES',),
  },
)


def __dir__() -> list[str]:
  return __all__
