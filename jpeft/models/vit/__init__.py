"""ViT, DeiT, DINOv2, DINOv3, BEiT, and the towers of images of CLIP and SigLIP."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import VIT_FAMILIES
  from .model import ViT
  from .sizes import VIT_SIZES
  from .towers import TOWER_FAMILIES

__all__ = ['TOWER_FAMILIES', 'VIT_FAMILIES', 'VIT_SIZES', 'ViT']

__getattr__ = on_first_use(
  __name__,
  {
    '.files': ('VIT_FAMILIES',),
    '.model': ('ViT',),
    '.sizes': ('VIT_SIZES',),
    '.towers': ('TOWER_FAMILIES',),
  },
)


def __dir__() -> list[str]:
  return __all__
