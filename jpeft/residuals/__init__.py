"""What a backward pass keeps, in few bits: pure arrays."""

from .compress import compressed
from .ops import PLAIN, gelu, tied

__all__ = [
  'PLAIN',
  'compressed',
  'gelu',
  'tied',
]
