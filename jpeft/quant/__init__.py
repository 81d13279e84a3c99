"""Few bits: 4-bit kernels of the backbone, decoded where they are read, and residuals that keep less than JAX would."""

from .bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .boxes import Quantized, nbytes, quantize
from .formats import Format, affine, fp4, int4, nf4

__all__ = ['Format', 'Quantized', 'affine', 'fp4', 'from_bitsandbytes', 'int4', 'nbytes', 'nf4', 'quantize',
           'to_bitsandbytes']
