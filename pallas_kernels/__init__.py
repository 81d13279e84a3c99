"""Kernels for 4-bit matrices on TPU (Mosaic) and GPU (Triton), each beside the plain form it must
equal.
"""

from .choice import Choice, choice
from .nf4 import nf4_matmul, reference
from .quantize import quantize_nf4

__all__ = [
  'Choice',
  'choice',
  'nf4_matmul',
  'quantize_nf4',
  'reference',
]
