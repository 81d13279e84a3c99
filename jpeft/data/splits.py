"""The slicing syntax of splits: 'train', 'train[:1000]', 'train[50%:]',
'train[:800]+test[:200]'.
"""

import re
from collections.abc import Sequence

from .source import nearest

_PART = re.compile(r'(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?')


def rows(split: str, splits: dict[str, Sequence[int]], where: str) -> Sequence[int]:
  """The rows that a split names.

  Args:
    split: names joined by '+', each with an optional slice. Bounds are as in Python: rows, or
      percent of the split rounded to the nearest row; negative ones count from the end.
    splits: {name: its rows}.
    where: the data set, for messages.

  Raises:
    ValueError: not such a text, no such split, or no row in it.
  """
  out = [_part(part.strip(), splits, where) for part in split.split('+')]
  found = out[0] if len(out) == 1 else [i for part in out for i in part]
  if not len(found):
    sizes = ', '.join(f'{name} ({len(r)})' for name, r in splits.items())
    raise ValueError(f'split {split!r} of {where} has no examples; it has {sizes}')
  return found


def _part(part: str, splits: dict[str, Sequence[int]], where: str) -> Sequence[int]:
  match = _PART.fullmatch(part)
  if not match:
    raise ValueError(
      f"{part!r} is no split; write 'train', 'train[:1000]', 'train[50%:]' or 'train+test'"
    )
  name = match['name']
  if name not in splits:
    raise ValueError(f'{where} has no split {name!r}; {nearest(name, splits)}')
  bound = lambda text: None if text is None else _row(text, len(splits[name]))
  return splits[name][bound(match['start']) : bound(match['stop'])]


def _row(text: str, size: int) -> int:
  if not text.endswith('%'):
    return int(text)
  percent = int(text[:-1])
  if abs(percent) > 100:
    raise ValueError(f'{text} in a split is more than 100%')
  return (abs(percent) * size + 50) // 100 if percent >= 0 else size - (-percent * size + 50) // 100
