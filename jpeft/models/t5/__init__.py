"""T5."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import T5_FAMILIES
  from .model import T5, T5Block, shift_right
  from .sizes import T5_SIZES

__all__ = ['T5', 'T5Block', 'T5_FAMILIES', 'T5_SIZES', 'shift_right']

__getattr__ = on_first_use(
  __name__,
  {
    '.files': ('T5_FAMILIES',),
    '.model': ('T5', 'T5Block', 'shift_right'),
    '.sizes': ('T5_SIZES',),
  },
)


def __dir__() -> list[str]:
  return __all__
