"""Llama, Mistral, SmolLM2, Qwen2 and Qwen3."""

from typing import TYPE_CHECKING

from ..lazy import on_first_use

if TYPE_CHECKING:
  from .files import LLAMA_FAMILIES
  from .model import Llama, LlamaBlock, grown

__all__ = ['LLAMA_FAMILIES', 'Llama', 'LlamaBlock', 'grown']

__getattr__ = on_first_use(
  __name__,
  {'LLAMA_FAMILIES': '.files', 'Llama': '.model', 'LlamaBlock': '.model', 'grown': '.model'},
)
