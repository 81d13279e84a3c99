"""Kernels for 4-bit matrices on TPU (Mosaic) and GPU (Triton), and the plain forms they equal."""

import importlib
from typing import TYPE_CHECKING, Any

from . import codes
from .choice import OPERATION, Choice, Coding, choice
from .codes import lookup, pack, unpack

if TYPE_CHECKING:
  from .nf4 import nf4_matmul, nf4_product, reference
  from .quantize import quantize_nf4
  from .spread import shares

__all__ = [
  'Choice',
  'Coding',
  'OPERATION',
  'choice',
  'codes',
  'lookup',
  'nf4_matmul',
  'nf4_product',
  'pack',
  'quantize_nf4',
  'reference',
  'shares',
  'unpack',
]

# Pallas takes a third of a second to import, and formats need the plain arithmetic alone.
_KERNELS = {
  'nf4_matmul': '.nf4',
  'nf4_product': '.nf4',
  'reference': '.nf4',
  'quantize_nf4': '.quantize',
  'shares': '.spread',
}


def __getattr__(name: str) -> Any:
  """The kernels, which are imported when they are first used."""
  if name not in _KERNELS:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_KERNELS[name], __name__), name)
