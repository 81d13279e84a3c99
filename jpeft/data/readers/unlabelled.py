"""Rows without a label: one rule for all readers of labels.

A label is missing where it is empty, null, NaN or -1, the mark of GLUE's test sets. A split none of
whose rows has a label is left out, and who asks for it is told so. In other splits the option
decides:

    unlabelled=refuse    the first such row is told (if the option is left out)
    unlabelled=skip      they are left out, and a note has their number
    unlabelled=class     -1 and the text 'nan' are classes as any other
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..labels import CLASSES, TASK_OF

OPTION = 'unlabelled'
CHOICES = ('refuse', 'skip', 'class')
_MARKS = ('-1', 'nan', 'NaN')  # as texts, which CSV files have


def rule(
  choice: str | None, column: str, kind: str = CLASSES, named: bool = False
) -> 'Unlabelled | None':
  """What is done with rows that have no class; None where labels are of another kind.

  Args:
    choice, column, named: see `Unlabelled`.
    kind: of the labels.

  Raises:
    ValueError: another choice, or one where there are no classes.
  """
  if kind == CLASSES:
    return Unlabelled(choice, column, named)
  if choice is not None:
    raise ValueError(
      f'{OPTION}={choice} is of rows without a class, and config.task={TASK_OF[kind]!r} learns '
      'none: leave it out'
    )
  return None


class Unlabelled:
  """What is done with the rows of a data set that have no label.

  Attributes:
    left_out: {split without any label: why}.
    notes: a sentence for each split of which rows were left out.
  """

  def __init__(self, choice: str | None, column: str, named: bool = False):
    """For one of CHOICES.

    Args:
      choice: None for the first.
      column: the name of the label, for messages.
      named: whether classes are numbers of given names, of which -1 is none.

    Raises:
      ValueError: another choice.
    """
    if choice not in (None, *CHOICES):
      raise ValueError(f'{OPTION}={choice} must be one of {", ".join(CHOICES)}')
    if named and choice == 'class':
      raise ValueError(f'{OPTION}=class: {column!r} has the numbers of given names; -1 is none')
    self._choice = choice or CHOICES[0]
    self._named = named
    self._column = column
    self.left_out: dict[str, str] = {}
    self.notes: list[str] = []

  def missing(self, label: Any) -> bool:
    """Whether this is no label."""
    if label is None or isinstance(label, float) and math.isnan(label):
      return True
    text = str(label).strip()
    return not text or (self._choice != 'class' and text in _MARKS)

  def labelled(
    self, split: str, name: str, labels: Sequence[Any], where: Callable[[int], str]
  ) -> list[int]:
    """The numbers of the rows that have a label.

    Args:
      split: their split, '' for data that come undivided.
      name: of what has them, such as a file.
      labels: of all rows, as they were read.
      where: number -> what has the row, such as 'line 3 of a.csv'.

    Raises:
      ValueError: rows without a label, if these are refused, or if undivided data have no other.
    """
    kept = [i for i, label in enumerate(labels) if not self.missing(label)]
    if len(kept) == len(labels):
      return kept
    first = next(i for i, label in enumerate(labels) if self.missing(label))
    if not kept and split:
      self.left_out[split] = (
        f'{name} has no labels: all its {self._column!r} are as {labels[first]!r} of {where(first)}'
      )
    elif not kept or self._choice != 'skip':
      advice = f'give it one, or say {OPTION}=skip to leave such rows out'
      if str(labels[first]).strip() in _MARKS and not self._named:
        advice += f', or {OPTION}=class where {labels[first]} is a class'
      raise ValueError(
        f'{where(first)} has {labels[first]!r} as its {self._column!r}; it must be a text or an '
        f'integer, and this is the mark of no label: {advice}'
      )
    else:
      self.notes.append(
        f'{name}: {len(labels) - len(kept):,} rows without a label are left out, the first is '
        f'{where(first)}'
      )
    return kept
