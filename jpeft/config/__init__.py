"""Configurations: Python files that read top to bottom, checked before the heavy imports."""

from .load import Command, differences, from_json, load, parse, to_json
from .schema import allow, complete, flatten, nearest, nest, reference

__all__ = [
  'Command',
  'allow',
  'complete',
  'differences',
  'flatten',
  'from_json',
  'load',
  'nearest',
  'nest',
  'parse',
  'reference',
  'to_json',
]
