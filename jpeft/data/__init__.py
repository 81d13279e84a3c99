"""Images and texts for transfer: named data sets, your own files, batches that resume exactly."""

from .batches import Batches
from .decode import decode
from .image import image_transform
from .load import load
from .packing import Packed, prompt
from .source import Source, in_memory
from .text import text_transform

__all__ = [
  'Batches',
  'Packed',
  'Source',
  'decode',
  'image_transform',
  'in_memory',
  'load',
  'prompt',
  'text_transform',
]
