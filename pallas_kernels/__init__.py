"""Kernels for 4-bit matrices on TPU (Mosaic) and GPU (Triton), each beside the plain form it must
equal.
"""

from . import codes
from .choice import Choice, Coding, choice
from .codes import halves, lookup, pack, unpack
from .nf4 import nf4_matmul, reference
from .quantize import quantize_nf4

__all__ = [
  'Choice',
  'Coding',
  'choice',
  'codes',
  'halves',
  'lookup',
  'nf4_matmul',
  'pack',
  'quantize_nf4',
  'reference',
  'unpack',
]
