"""Narrow models: fewer blocks, heads, hidden units and words, cut out of a model and its weights.

The residual stream keeps its width. A cut head or hidden unit adds nothing to it, so that the
narrow model computes what the wide one would compute with zeros in the cut places.
"""

from .backbone import narrowed
from .keep import Keep
from .method import (
  Pruned,
  cuts_anything,
  keep_of,
  pruned,
  prunes,
  recovered,
  recovers,
)
from .theta import narrowed_theta, widened_theta

__all__ = [
  'Keep',
  'Pruned',
  'cuts_anything',
  'keep_of',
  'narrowed',
  'narrowed_theta',
  'pruned',
  'prunes',
  'recovered',
  'recovers',
  'widened_theta',
]
