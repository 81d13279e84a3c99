"""Kinds of labels: one class of several, numbers, or a set of classes."""

import decimal
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from .source import Dataset, Example, Source

CLASSES = 'classes'  # label: the number of a class
NUMBERS = 'numbers'  # label: float32 [K], NaN where a number is missing; `classes` names them
SETS = 'sets'  # label: float32 [C], 1 for a class of the example, 0 for others, NaN if not known
TAGS = 'tags'  # label: the number of a tag for each of the 'words' of a sentence
ANSWERS = 'answers'  # 'answers' to a 'question' on a 'context', and no label
NOTHING = 'nothing'  # texts alone; labels that there may be are left out
PREFERENCES = 'preferences'  # a 'chosen' and a 'rejected' text, and no label
KINDS = (CLASSES, NUMBERS, SETS, TAGS, ANSWERS, NOTHING, PREFERENCES)
# The task that learns each kind.
TASK_OF = {
  CLASSES: 'classification',
  NUMBERS: 'regression',
  SETS: 'multilabel',
  TAGS: 'tokens',
  ANSWERS: 'questions',
  NOTHING: 'masked',
  PREFERENCES: 'preferences',
}
_MISSING = ('', 'nan', 'NaN', 'NA')
_LARGEST = float(np.finfo(np.float32).max)


def of_kind(dataset: Dataset, wanted: str, name: str) -> Dataset:
  """The data set with labels of the kind that is wanted.

  Classes whose names are all numbers, such as ratings, are numbers where these are wanted.

  Args:
    dataset: with labels of its own kind.
    wanted: one of KINDS.
    name: of the data set, for messages.

  Raises:
    ValueError: its labels are of another kind.
  """
  if wanted == NOTHING:
    return dataset._replace(classes=[], labels=NOTHING)
  if dataset.labels == wanted:
    return dataset
  if PREFERENCES in (wanted, dataset.labels):
    which = 'no ' if wanted == PREFERENCES else ''
    raise ValueError(
      f'{name} has {which}chosen and rejected answers, of config.task={TASK_OF[PREFERENCES]!r}'
    )
  if not dataset.classes:
    return dataset
  if (dataset.labels, wanted) == (CLASSES, NUMBERS):
    return _numbered(dataset, name)
  raise ValueError(
    f'{name} has {_told(dataset.labels)} as labels, not {_told(wanted)}: set '
    f'config.task={TASK_OF[dataset.labels]!r}'
  )


def _told(kind: str) -> str:
  return {
    CLASSES: 'one class each',
    NUMBERS: 'numbers',
    SETS: 'sets of classes',
    TAGS: 'tags of words',
    ANSWERS: 'answers to questions',
    NOTHING: 'none',
  }[kind]


def _numbered(dataset: Dataset, name: str) -> Dataset:
  """Classes with names that are numbers as these numbers."""
  values = numbers_of(dataset.classes, name)
  read = dataset.read
  label_of = dataset.label_of

  def read_number(row: int) -> Example:
    example = read(row)
    return example | {'label': np.array([values[example['label']]], np.float32)}

  def number_of(row: int) -> np.ndarray:
    return np.array([values[label_of(row)]], np.float32)

  return dataset._replace(
    read=read_number,
    classes=['label'],
    labels=NUMBERS,
    label_of=None if label_of is None else number_of,
  )


def numbers_of(classes: Sequence[str], name: str) -> list[float]:
  """The numbers that classes are called by.

  Args:
    classes: their names.
    name: of the data set, for messages.

  Raises:
    ValueError: a name that is no number.
  """
  values = []
  for label in classes:
    try:
      values.append(number(label))
    except ValueError:
      raise ValueError(
        f'{name} has the class {label!r}, which is no number: to predict classes, set '
        "config.task='classification'"
      ) from None
  return values


def labels_of(source: Source) -> list[Any]:
  """The labels of all examples, without reading the examples themselves where that can be."""
  label_of = getattr(source, 'label_of', None)
  if label_of is not None:
    return [label_of(row) for row in source.rows]
  return [source[i]['label'] for i in range(len(source))]


def number(value: Any) -> float:
  """A number of a file, NaN where it is missing.

  Raises:
    ValueError: it is no number, or too large for a finite float32.
  """
  if value is None or value in _MISSING:
    return float('nan')
  if isinstance(value, bool) or not isinstance(value, (str, numbers.Real, decimal.Decimal)):
    raise ValueError(f'{value!r} is no number')
  found = float(value)
  if abs(found) > _LARGEST:
    raise ValueError(f'{value!r} is not finite')
  return found


# How a file says that an example has a class, or has not.
_SAID = {'1': 1.0, 'true': 1.0, '0': 0.0, 'false': 0.0, '-1': float('nan')}


def membership(value: Any) -> float:
  """1, 0 or, where it is not known, NaN, of 1, 0, true, false, -1 or nothing.

  Raises:
    ValueError: none of these.
  """
  if value is None or value != value or value in _MISSING:
    return float('nan')
  said = str(value).lower().removesuffix('.0')
  if said not in _SAID:
    raise ValueError(f'{value!r} is neither 1 nor 0')
  return _SAID[said]


def sets_of(members: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
  """float32 [N, C] of the names of the classes of each example."""
  numbers = {name: i for i, name in enumerate(classes)}
  table = np.zeros((len(members), len(classes)), np.float32)
  for row, names in enumerate(members):
    table[row, [numbers[name] for name in names]] = 1
  return table


def in_order(labels: set[str]) -> list[str]:
  """The labels by their value if all are integers, else in alphabetical order."""
  try:
    return sorted(labels, key=int)
  except ValueError:
    return sorted(labels)
