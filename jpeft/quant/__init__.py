"""4-bit kernels of the backbone, which are decoded where the model reads them."""

from .bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .boxes import Quantized, nbytes
from .encoding import check_implementation, coded, kernels, quantize
from .formats import (
  FORMATS,
  Blocks,
  Format,
  affine,
  fp4,
  int4,
  named,
  nf4,
  register_format,
  registered_module,
)
from .told import told

__all__ = [
  'Blocks',
  'FORMATS',
  'Format',
  'Quantized',
  'affine',
  'check_implementation',
  'coded',
  'fp4',
  'from_bitsandbytes',
  'int4',
  'kernels',
  'named',
  'nbytes',
  'nf4',
  'quantize',
  'register_format',
  'registered_module',
  'to_bitsandbytes',
  'told',
]
