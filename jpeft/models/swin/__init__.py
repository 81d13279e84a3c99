"""Swin."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import SWIN_FAMILIES
  from .model import Swin

__all__ = ['SWIN_FAMILIES', 'Swin']

__getattr__ = on_first_use(__name__, {'.files': ('SWIN_FAMILIES',), '.model': ('Swin',)})


def __dir__() -> list[str]:
  return __all__
