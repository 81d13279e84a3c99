"""The slicing of splits: 'train', 'train[:1000]', 'train[50%:]', 'train[:800]+test[:200]'."""

import re

from .source import Rows, suggestion

_PART = re.compile(r'(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?')


def rows(
  split: str, splits: dict[str, Rows], where: str, left_out: dict[str, str] | None = None
) -> Rows:
  """The rows that a split names.

  Args:
    split: names joined by '+', each with an optional slice. Bounds are as in Python: rows, or
      percent of the split rounded to the nearest row; negative ones count from the end.
    splits: {name: its rows}.
    where: the data set, for messages.
    left_out: {split that cannot be used: why}.

  Raises:
    ValueError: not such a text, no such split, or no row in it.
  """
  parts = [_part(part.strip(), splits, where, left_out or {}) for part in split.split('+')]
  if len(parts) == 1:
    chosen = parts[0]
  else:
    chosen = [row for part in parts for row in part]
  if not len(chosen):
    sizes = ', '.join(f'{name} ({len(found)})' for name, found in splits.items())
    raise ValueError(f'split {split!r} of {where} has no examples; it has {sizes}')
  return chosen


def _part(part: str, splits: dict[str, Rows], where: str, left_out: dict[str, str]) -> Rows:
  """The rows of one name with its slice."""
  match = _PART.fullmatch(part)
  if not match:
    raise ValueError(
      f"{part!r} is no split; write 'train', 'train[:1000]', 'train[50%:]' or 'train+test'"
    )
  name = match['name']
  if name in left_out:
    raise ValueError(f'{where} has no split {name!r}: {left_out[name]}')
  if name not in splits:
    raise ValueError(f'{where} has no split {name!r}; {suggestion(name, splits)}')
  found = splits[name]
  start = _bound(match['start'], len(found))
  stop = _bound(match['stop'], len(found))
  return found[start:stop]


def _bound(text: str | None, size: int) -> int | None:
  """A bound of a slice: rows, or percent of `size`; None if it was left out."""
  if text is None:
    return None
  if not text.endswith('%'):
    return int(text)
  percent = int(text[:-1])
  if abs(percent) > 100:
    raise ValueError(f'{text} in a split is more than 100%')
  count = (abs(percent) * size + 50) // 100  # rounded to the nearest row
  if percent < 0:
    return size - count
  return count
