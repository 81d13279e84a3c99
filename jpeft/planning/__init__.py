"""What a training step needs of a device that need not be there."""
from .devices import Target, target

__all__ = [
  'Target',
  'target',
]
