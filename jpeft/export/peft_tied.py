"""Word tables that transformers reads twice, or in a module of its own."""

from collections.abc import Mapping

import numpy as np

from .peft_found import Folder
from .peft_matrices import PARTS, Factors
from .peft_names import Arrays, module_of

HEAD = 'lm_head'  # the module that is the word table of a tied model


def check_unread(found: Folder, config: Mapping, arrays: Arrays) -> None:
  """Raises a ValueError if something acts on a table that transformers does not read there."""
  path = arrays.unread_table
  adapted = path in found.factors
  saved = path in found.whole and is_saved(arrays.places[path][1][0], config)
  if path is not None and (adapted or saved):
    raise ValueError(
      f'{found.where}: {module_of(arrays.places[path][1][0])!r} of T5 is read by no layer in '
      'transformers, so that in peft this adapter has no effect'
    )


def is_saved(key: str, config: Mapping) -> bool:
  """Whether modules_to_save names the module of a key, so that peft has a copy of it."""
  names = config.get('modules_to_save') or ()
  return any(f'.{name}.' in f'.{module_of(key)}.' for name in names)


def check_tied(
  found: Folder, config: Mapping, arrays: Arrays, head: Mapping[str, np.ndarray]
) -> None:
  """Raises a ValueError if the word table and the head of a tied model would part.

  Args:
    found: what there is of the table.
    config: of the folder.
    arrays: of the backbone.
    head: {end of a key: array} of what there is of the head.
  """
  path = arrays.tied
  if path is None:
    return
  factors = found.factors.get(path, {}).get(0)
  whole = found.whole.get(path, {}).get(0)
  parted = None
  if config.get('use_dora') and factors is not None:
    parted = 'have magnitudes of their own'
  elif not _same_head(head, factors, whole):
    parted = 'are changed in different ways'
  elif config.get('ensure_weight_tying') or head:
    return
  elif factors is not None or is_saved(arrays.places[path][1][0], config):
    parted = 'part, since peft changes the table alone (ensure_weight_tying=False)'
  if parted is not None and (head or factors is not None or whole is not None):
    raise ValueError(
      f'{found.where}: the head of this backbone is its word table, and in peft the two {parted}: '
      'load the adapter on jpeft.models.untied(pretrained)'
    )


def _same_head(
  head: Mapping[str, np.ndarray], factors: Factors | None, whole: np.ndarray | None
) -> bool:
  """Whether the head has what the table has, if it has anything."""
  head = {end: x for end, x in head.items() if not end.startswith('base_layer.')}
  want = tied_head(factors.parts if factors else {}, whole)
  if not head:
    return True
  return head.keys() == want.keys() and all(np.array_equal(x, want[end]) for end, x in head.items())


def tied_head(parts: Mapping[str, np.ndarray], whole: np.ndarray | None) -> dict[str, np.ndarray]:
  """{end of a key: array} of a head that has what its table has, by parts or whole."""
  if whole is not None:
    return {'weight': whole}
  if not parts:
    return {}
  # The kernel [d, V] of the head is the table [V, d] transposed: a b becomes b.T a.T.
  return {PARTS['a']: np.asarray(parts['b']), PARTS['b']: np.asarray(parts['a'])}
