"""The mechanism: sites, rules, and `attach`."""

from .anatomy import ANATOMIES, Anatomy, register_anatomy
from .attach import attach
from .backends.choice import backend_of
from .boxes import Box
from .context import Bound
from .discover import sites_of
from .freeze import freeze, join, mask, split
from .fused import Operand
from .mode import flags_of
from .paths import RIDER, join_path, natural
from .rules import MEMORY_CLASSES, Call, Method, Weight, at, chain, matrix
from .sites import Leaf, Site, Sites
from .summary import count, summary
from .tuned import Tuned

__all__ = [
  'ANATOMIES',
  'Anatomy',
  'Bound',
  'Box',
  'Call',
  'Leaf',
  'MEMORY_CLASSES',
  'Method',
  'Operand',
  'RIDER',
  'Site',
  'Sites',
  'Tuned',
  'Weight',
  'at',
  'attach',
  'backend_of',
  'chain',
  'count',
  'flags_of',
  'freeze',
  'join',
  'join_path',
  'mask',
  'matrix',
  'natural',
  'register_anatomy',
  'sites_of',
  'split',
  'summary',
]
