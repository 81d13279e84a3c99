"""Configurations: Python files that read top to bottom, checked before the heavy imports."""

from .listing import listing, reference
from .load import (
  Command,
  as_text,
  changes,
  differences,
  from_json,
  load,
  overridden,
  overrides_of,
  packaged,
  parse,
  to_json,
)
from .schema import TASKS, TEXT_METRICS, TRACKERS, allow, complete, flatten, nearest, nest

__all__ = [
  'Command',
  'TASKS',
  'TEXT_METRICS',
  'TRACKERS',
  'allow',
  'as_text',
  'changes',
  'complete',
  'differences',
  'flatten',
  'from_json',
  'listing',
  'load',
  'nearest',
  'nest',
  'overridden',
  'overrides_of',
  'packaged',
  'parse',
  'reference',
  'to_json',
]
