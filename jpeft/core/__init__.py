"""The mechanism: sites, rules, and `attach`."""

from .anatomy import ANATOMIES, Anatomy, register_anatomy
from .attach import Bound, Tuned, attach
from .boxes import Box
from .cut import Halves, cut
from .inspect import sites_of
from .masks import freeze, join, mask, split
from .rules import Call, Method, Weight, at, chain, matrix
from .sites import Leaf, Site, Sites
from .summary import count, summary

__all__ = [
  'ANATOMIES', 'Anatomy', 'Bound', 'Box', 'Call', 'Halves', 'Leaf', 'Method', 'Site', 'Sites', 'Tuned', 'Weight',
  'at', 'attach', 'chain', 'count', 'cut', 'freeze', 'join', 'mask', 'matrix', 'register_anatomy', 'sites_of',
  'split', 'summary',
]
