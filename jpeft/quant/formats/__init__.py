"""4-bit formats: how a matrix is coded, how it lies in memory, and what it stands for."""

from .affine import Affine, affine
from .blocks import GROUP, MAP, Blocks, Format
from .fp4 import Fp4, fp4
from .int4 import Int4, Int4Minimum, int4
from .nf4 import Nf4, nf4
from .registry import FORMATS, named, register_format, registered_module

__all__ = [
  'Affine',
  'Blocks',
  'FORMATS',
  'Format',
  'Fp4',
  'GROUP',
  'Int4',
  'Int4Minimum',
  'MAP',
  'Nf4',
  'affine',
  'fp4',
  'int4',
  'named',
  'nf4',
  'register_format',
  'registered_module',
]
