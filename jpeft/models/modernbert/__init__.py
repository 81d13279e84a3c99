"""ModernBERT."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import MODERNBERT_FAMILIES
  from .model import ModernBert

__all__ = ['MODERNBERT_FAMILIES', 'ModernBert']

__getattr__ = on_first_use(
  __name__, {'.files': ('MODERNBERT_FAMILIES',), '.model': ('ModernBert',)}
)


def __dir__() -> list[str]:
  return __all__
