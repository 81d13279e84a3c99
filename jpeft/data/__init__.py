"""Images and texts for transfer: named data sets, your own files, batches that resume exactly."""

from .batches import Batches
from .decode import decode
from .image import image_transform
from .load import load, register_dataset, registered_module
from .packing import Packed, prompt
from .source import Dataset, Source, in_memory
from .text import check_texts, text_transform

__all__ = [
  'Batches',
  'Dataset',
  'Packed',
  'Source',
  'check_texts',
  'decode',
  'image_transform',
  'in_memory',
  'load',
  'prompt',
  'register_dataset',
  'registered_module',
  'text_transform',
]
