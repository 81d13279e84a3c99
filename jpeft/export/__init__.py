"""Theta and merged weights in the layouts of other libraries."""

from .peft_adapter import CONFIG, FILE, load_adapter, save_adapter

__all__ = [
  'CONFIG',
  'FILE',
  'load_adapter',
  'save_adapter',
]
