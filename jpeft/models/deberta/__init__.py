"""DeBERTa-v3."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import DEBERTA_FAMILIES
  from .model import Deberta

__all__ = ['DEBERTA_FAMILIES', 'Deberta']

__getattr__ = on_first_use(__name__, {'.files': ('DEBERTA_FAMILIES',), '.model': ('Deberta',)})


def __dir__() -> list[str]:
  return __all__
