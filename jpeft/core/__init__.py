"""The mechanism: sites, rules, and `attach`."""

from .anatomy import ANATOMIES, Anatomy, register_anatomy
from .attach import Bound, Tuned, attach, flags_of
from .backends.linen import RIDER
from .boxes import Box
from .discover import backend_of, sites_of
from .freeze import freeze, join, mask, split
from .fused import Operand
from .rules import MEMORY_CLASSES, Call, Method, Weight, at, chain, matrix
from .sites import Leaf, Site, Sites, natural
from .summary import count, summary

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
  'mask',
  'matrix',
  'natural',
  'register_anatomy',
  'sites_of',
  'split',
  'summary',
]
