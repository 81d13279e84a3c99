"""The mechanism: sites, rules, and `attach`."""

from .anatomy import ANATOMIES, Anatomy, Part, register_anatomy
from .at_head import NotAtHead, at_head
from .attach import attach
from .backends.choice import backend_of
from .boxed import Multiplied, noting
from .boxes import Box
from .context import Bound
from .device_heads import heads_over
from .discover import sites_of
from .dot_product import dot_product_attention, grouped_attention, soft_cap
from .early import Update, early_updates, falling_adam, weights_of
from .edits import State
from .entries import entry_path, names_entry
from .freeze import freeze, join, mask, split
from .frozen import frozen
from .generated import generated
from .generator import Place
from .grouped import grouped_dot
from .idle import read_row, write_row
from .keys import named_key
from .layers import Layers, all_but
from .mode import flags_of
from .paths import EXTRAS, join_path, leaf_paths, natural
from .preparation import Found, Moved, MovedLayer, Preparation, before_storage, bounds, unprepared
from .preparing import (
  Examples,
  Pass,
  beside,
  cross_entropy,
  found_in,
  layers_of,
  prepare,
  prepared_by,
  resolved,
  stand_in,
  to_store,
  whole_of,
  with_found,
  with_sizes,
)
from .products import Operand
from .rules import (
  FULL_CROSSING,
  MEMORY_CLASSES,
  NO_BACKPROP,
  PARTIAL_REENTRY,
  REQUIREMENTS,
  Call,
  Method,
  Origin,
  Rule,
  Weight,
  at,
  chain,
  factory,
  in_layers,
  matrix,
  memory_class,
)
from .sites import Leaf, Site, Sites
from .summary import count, summary
from .task_loss import TaskLoss
from .token_mask import TokenMask
from .tuned import Tuned

__all__ = [
  'Multiplied',
  'noting',
  'NotAtHead',
  'TaskLoss',
  'TokenMask',
  'at_head',
  'dot_product_attention',
  'early_updates',
  'ANATOMIES',
  'Anatomy',
  'Bound',
  'Box',
  'Call',
  'EXTRAS',
  'Examples',
  'FULL_CROSSING',
  'Layers',
  'Found',
  'Leaf',
  'MEMORY_CLASSES',
  'Method',
  'Moved',
  'MovedLayer',
  'Multiplied',
  'NO_BACKPROP',
  'NotAtHead',
  'Operand',
  'Origin',
  'PARTIAL_REENTRY',
  'Part',
  'Pass',
  'Place',
  'Preparation',
  'REQUIREMENTS',
  'Rule',
  'Site',
  'Sites',
  'State',
  'TokenMask',
  'Tuned',
  'Update',
  'Weight',
  'all_but',
  'at',
  'at_head',
  'attach',
  'backend_of',
  'before_storage',
  'beside',
  'bounds',
  'chain',
  'count',
  'cross_entropy',
  'dot_product_attention',
  'entry_path',
  'factory',
  'falling_adam',
  'flags_of',
  'found_in',
  'freeze',
  'frozen',
  'generated',
  'grouped_attention',
  'grouped_dot',
  'heads_over',
  'in_layers',
  'join',
  'join_path',
  'layers_of',
  'leaf_paths',
  'mask',
  'matrix',
  'memory_class',
  'named_key',
  'names_entry',
  'natural',
  'noting',
  'prepare',
  'prepared_by',
  'read_row',
  'register_anatomy',
  'resolved',
  'sites_of',
  'soft_cap',
  'split',
  'stand_in',
  'summary',
  'to_store',
  'unprepared',
  'weights_of',
  'whole_of',
  'with_found',
  'with_sizes',
  'write_row',
]
