"""GPT-2 and OPT."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import GPT_FAMILIES
  from .model import Gpt
  from .sizes import GPT_SIZES

__all__ = ['GPT_FAMILIES', 'GPT_SIZES', 'Gpt']

__getattr__ = on_first_use(
  __name__,
  {'.files': ('GPT_FAMILIES',), '.model': ('Gpt',), '.sizes': ('GPT_SIZES',)},
)


def __dir__() -> list[str]:
  return __all__
