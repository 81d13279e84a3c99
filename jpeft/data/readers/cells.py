"""What a cell of a table says as a label.

The functions raise a ValueError that says what the cell must be, as in 'it must be {error}'.
"""

from collections.abc import Callable
from typing import Any

from ..labels import CLASSES, NUMBERS, SETS, membership, number


def class_of(value: Any) -> str:
  """The name of a class, of a text or an integer."""
  if not isinstance(value, (str, int)) or value == '':
    raise ValueError('a text or an integer')
  return str(value)


def number_of(value: Any) -> float:
  """A finite number; NaN where it is missing."""
  try:
    return number(value)
  except ValueError:
    raise ValueError('a number') from None


def membership_of(value: Any) -> float:
  """1 for a class that is there, 0 for one that is not; NaN where it is not known."""
  try:
    return membership(value)
  except ValueError:
    raise ValueError('1 or 0, or -1 if it is not known') from None


def names_of(value: Any) -> list[str]:
  """The names of the classes that a list has."""
  is_list = isinstance(value, list)
  if not is_list or not all(isinstance(name, (str, int)) and name != '' for name in value):
    raise ValueError('a list of texts or integers')
  if len(set(value)) < len(value) and set(value) <= {0, 1}:
    raise ValueError('a list of classes, and not a 1 or 0 for each: make these columns (label=a,b)')
  return [str(name) for name in value]


# {(kind of labels, whether one column lists the classes of a row): what reads a cell}
CELLS: dict[tuple[str, bool], Callable[[Any], Any]] = {
  (CLASSES, False): class_of,
  (NUMBERS, False): number_of,
  (SETS, False): membership_of,
  (SETS, True): names_of,
}
