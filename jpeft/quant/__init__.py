"""Few bits: 4-bit kernels of the backbone, decoded where they are read, and residuals that keep
less than JAX would.
"""

from .bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .boxes import Quantized, nbytes
from .formats.base import TABLES, Format, affine, fp4, int4, lookup, named, nf4
from .formats.maps import NF4, midpoints
from .kernels import coded, kernels, quantize

__all__ = [
  'Format',
  'NF4',
  'Quantized',
  'TABLES',
  'affine',
  'coded',
  'fp4',
  'from_bitsandbytes',
  'int4',
  'kernels',
  'lookup',
  'midpoints',
  'named',
  'nbytes',
  'nf4',
  'quantize',
  'to_bitsandbytes',
]
