"""Theta and merged weights in the layouts of other libraries."""

from .merged import check_mergeable, save_merged
from .peft_adapter import load_adapter, save_adapter
from .peft_config import CONFIG
from .peft_folder import FILE

__all__ = [
  'CONFIG',
  'FILE',
  'check_mergeable',
  'load_adapter',
  'save_adapter',
  'save_merged',
]
