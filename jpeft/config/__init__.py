"""Configurations: Python files that read top to bottom, checked before anything heavy is imported."""
from .schema import Command, complete, differences, flatten, from_json, load, nearest, nest, parse, reference, to_json

__all__ = [
  'Command',
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
