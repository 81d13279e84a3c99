"""ConvNeXt and ConvNeXt V2."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import CONVNEXT_FAMILIES
  from .model import ConvNeXt

__all__ = ['CONVNEXT_FAMILIES', 'ConvNeXt']

__getattr__ = on_first_use(__name__, {'.files': ('CONVNEXT_FAMILIES',), '.model': ('ConvNeXt',)})


def __dir__() -> list[str]:
  return __all__
