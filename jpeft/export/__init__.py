"""Theta and merged weights in the layouts of other libraries."""

from .merged import check_mergeable, save_merged
from .peft_adapter import CONFIG, FILE, load_adapter, save_adapter

__all__ = [
  'CONFIG',
  'FILE',
  'check_mergeable',
  'load_adapter',
  'save_adapter',
  'save_merged',
]
