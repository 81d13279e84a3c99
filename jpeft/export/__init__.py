"""Theta and merged weights in the layouts of other libraries."""

from .bottlenecks import FILE as BOTTLENECK_FILE
from .merged import check_mergeable, save_merged
from .peft_adapter import load_adapter, save_adapter
from .peft_config import CONFIG
from .peft_folder import FILE

__all__ = [
  'BOTTLENECK_FILE',
  'CONFIG',
  'FILE',
  'check_mergeable',
  'load_adapter',
  'save_adapter',
  'save_merged',
]
