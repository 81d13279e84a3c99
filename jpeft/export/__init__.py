"""Theta and merged weights in the layouts of other libraries."""

from .bottlenecks import FILE as BOTTLENECK_FILE
from .merged import check_mergeable, save_merged
from .peft_adapter import load_adapter, save_adapter
from .peft_config import CONFIG
from .peft_folder import FILE
from .peft_kin import KIN

# Methods whose adapter folders have tensors of their own.
PEFT_KINDS = tuple(kin.factory for kin in KIN.values())

__all__ = [
  'BOTTLENECK_FILE',
  'CONFIG',
  'FILE',
  'PEFT_KINDS',
  'check_mergeable',
  'load_adapter',
  'save_adapter',
  'save_merged',
]
