"""The labels of tables that are read by row.

They are read at once, and checked with their row. A split none of whose rows has a label is left
out, as the test sets of GLUE are: labels that are null or NaN, and numbers that are all -1. What
becomes of other rows without a class is said in `unlabelled`; other rows without a number or a set
are refused.

A column of classes has numbers of given names, and these names are what is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..labels import CLASSES, NUMBERS, SETS, TAGS, TASK_OF, in_order, numbers_of, sets_of
from .cells import membership_of, names_of, number_of
from .columns import Column
from .tags import ordered, tags_of
from .unlabelled import Unlabelled, rule


class Table(Protocol):
  """The rows of a split.

  Attributes:
    name: such as that of a file.
  """

  name: str

  def __len__(self) -> int: ...

  def where(self, row: int) -> str:
    """What has a row, such as 'row 3 of a.parquet'."""

  def values(self, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The values of some columns of each row, in order."""


class RowLabels:
  """What the rows of a source have as labels; of this class itself, none.

  Rows that are used are numbered through all splits, in the order in which these are read.

  Attributes:
    left_out: {split that has none: why}.
  """

  def __init__(self, source: str, columns: Mapping[str, Column], unlabelled: Unlabelled | None):
    """For a source.

    Args:
      source: as it was named, for messages.
      columns: {name: what it has} of the columns of labels.
      unlabelled: what becomes of rows without a class; None where labels are of another kind.
    """
    self.source = source
    self.columns = columns
    self.left_out: dict[str, str] = {}
    self._unlabelled = unlabelled

  @property
  def notes(self) -> tuple[str, ...]:
    """Sentences on rows that were left out."""
    return () if self._unlabelled is None else tuple(self._unlabelled.notes)

  def read(self, split: str, table: Table) -> Sequence[int]:
    """Reads the labels of a split: the rows that are used; none of one that is left out.

    Raises:
      ValueError: a label that is missing or is none.
    """
    return range(len(table))

  def classes(self) -> list[str]:
    """The name of each label, once all splits are read."""
    return []

  def of(self, row: int) -> Any:
    """The label of a row, once `classes` has said what there is."""
    return None


class _OneColumn(RowLabels):
  """Labels of one column.

  Attributes:
    name: of the column.
    column: what it has.
  """

  def __init__(self, source: str, columns: Mapping[str, Column], unlabelled: Unlabelled | None):
    super().__init__(source, columns, unlabelled)
    ((self.name, self.column),) = columns.items()


class _Classes(_OneColumn):
  """A class each."""

  def __init__(self, source: str, columns: Mapping[str, Column], unlabelled: Unlabelled | None):
    super().__init__(source, columns, unlabelled)
    self._found: list[str] = []
    self._numbers: dict[str, int] = {}

  def read(self, split: str, table: Table) -> Sequence[int]:
    found = []
    known: dict[Any, Any] = {}  # each text is kept once
    for row, values in enumerate(table.values((self.name,))):
      value = values[self.name]
      if isinstance(value, (list, dict)):
        raise ValueError(
          f'{table.where(row)} has {value!r:.60} as its label; it must be a text or an integer'
        )
      if value not in known:
        known[value] = self._said(value, table, row)
      found.append(known[value])
    kept = self._unlabelled.labelled(split, table.name, found, table.where)
    if split in self._unlabelled.left_out:
      self.left_out[split] = self._unlabelled.left_out[split]
      return ()
    self._found += [found[row] for row in kept]
    return kept

  def _said(self, value: Any, table: Table, row: int) -> Any:
    """A label as a text; as it was read where it is none."""
    if self.column.kind == 'class' and value not in (None, -1):
      return _named(value, self.column, table, row)
    if value is None or value != value:  # NaN
      return value
    if isinstance(value, float):
      if not value.is_integer():
        raise ValueError(
          f'{table.where(row)} has the label {value}; it must be a text or an integer: to learn '
          f'numbers, set config.task={TASK_OF[NUMBERS]!r}'
        )
      value = int(value)
    return str(value)

  def classes(self) -> list[str]:
    classes = list(self.column.classes) or in_order(set(self._found))
    self._numbers = {name: number for number, name in enumerate(classes)}
    return classes

  def of(self, row: int) -> int:
    return self._numbers[self._found[row]]


class _Floats(RowLabels):
  """A number of each column, NaN where it is missing.

  Attributes:
    float_of: what reads a cell, of `cells`.
  """

  float_of: Callable[[Any], float]

  def __init__(self, source: str, columns: Mapping[str, Column], unlabelled: Unlabelled | None):
    super().__init__(source, columns, unlabelled)
    self._found: list[np.ndarray] = []  # float32 [N, K] of each split
    self._all = np.zeros((0, len(columns)), np.float32)

  def read(self, split: str, table: Table) -> Sequence[int]:
    found = np.empty((len(table), len(self.columns)), np.float32)
    for row, values in enumerate(table.values(tuple(self.columns))):
      for place, (name, column) in enumerate(self.columns.items()):
        found[row, place] = self._float(values[name], name, column, table, row)
    is_missing = np.isnan(found)
    listed = ', '.join(self.columns)
    if split and len(table) and (is_missing | (found == -1)).all():
      self.left_out[split] = f'{table.name} has no labels: all its {listed} are empty or -1'
      return ()
    unlabelled = is_missing.all(axis=1)
    if unlabelled.any():
      raise ValueError(f'{table.where(int(unlabelled.argmax()))} has no label: {listed} are empty')
    self._found.append(found)
    return range(len(table))

  def _float(self, value: Any, name: str, column: Column, table: Table, row: int) -> float:
    if column.kind == 'class' and value == -1:
      return np.nan
    if column.kind == 'class' and value is not None:
      value = _named(value, column, table, row)
    try:
      return self.float_of(value)
    except ValueError as error:
      raise _unfit(table.where(row), value, name, str(error)) from None

  def classes(self) -> list[str]:
    if self._found:
      self._all = np.concatenate(self._found)
    return list(self.columns)

  def of(self, row: int) -> np.ndarray:
    return self._all[row]


class _Numbers(_Floats):
  """Numbers."""

  float_of = staticmethod(number_of)

  def __init__(self, source: str, columns: Mapping[str, Column], unlabelled: Unlabelled | None):
    super().__init__(source, columns, unlabelled)
    for column in columns.values():
      numbers_of(column.classes, source)


class _Members(_Floats):
  """Sets of classes with a column of 1 and 0 for each."""

  float_of = staticmethod(membership_of)


class _Listed(_OneColumn):
  """Labels of a column of lists."""

  def read(self, split: str, table: Table) -> Sequence[int]:
    without = []  # rows that have no list
    for row, values in enumerate(table.values((self.name,))):
      value = values[self.name]
      if value is None:
        without.append(row)
      elif not isinstance(value, list):
        raise _unfit(table.where(row), value, self.name, 'a list')
      elif not without:
        self.add(value, table, row)
    if without and split and len(without) == len(table):
      self.left_out[split] = f'{table.name} has no labels: all its {self.name!r} are null'
      return ()
    if without:
      raise ValueError(f'{table.where(without[0])} has no label: its {self.name!r} is null')
    return range(len(table))

  def add(self, value: list[Any], table: Table, row: int) -> None:
    """Takes the labels of a row; raises a ValueError if they are none."""
    raise NotImplementedError


class _Lists(_Listed):
  """Sets of classes, which a column lists."""

  def __init__(self, source: str, columns: Mapping[str, Column], unlabelled: Unlabelled | None):
    super().__init__(source, columns, unlabelled)
    self._found: list[tuple[str, ...]] = []
    self._known: dict[tuple[str, ...], tuple[str, ...]] = {}  # each set is kept once
    self._classes: list[str] = []

  def add(self, value: list[Any], table: Table, row: int) -> None:
    if self.column.classes and None not in value:
      value = [_named(number, self.column, table, row) for number in value]
    try:
      names = tuple(names_of(value))
    except ValueError as error:
      raise _unfit(table.where(row), value, self.name, str(error)) from None
    self._found.append(self._known.setdefault(names, names))

  def classes(self) -> list[str]:
    found = {name for names in self._known for name in names}
    self._classes = list(self.column.classes) or in_order(found)
    return list(self._classes)

  def of(self, row: int) -> np.ndarray:
    return sets_of([self._found[row]], self._classes)[0]


class _Tags(_Listed):
  """A tag for each word; they are checked at once, and read again with the words of their row."""

  def __init__(self, source: str, columns: Mapping[str, Column], unlabelled: Unlabelled | None):
    super().__init__(source, columns, unlabelled)
    self._found: set[str] = set()

  def add(self, value: list[Any], table: Table, row: int) -> None:
    named = self.column.classes or None
    self._found.update(tags_of(table.where(row), self.name, named, value))

  def classes(self) -> list[str]:
    return list(self.column.classes) or ordered(self._found)


def row_labels(
  source: str, kind: str, columns: Mapping[str, Column], choice: str | None
) -> RowLabels:
  """What reads the labels of a source.

  Args:
    source: as it was named, for messages.
    kind: of labels, see `..labels`.
    columns: {name: what it has} of the columns of labels; none where examples have no labels.
    choice: of `unlabelled`.

  Raises:
    ValueError: a choice that is none, or names of classes that are no numbers where these are
      learned.
  """
  named = any(column.classes for column in columns.values())
  unlabelled = rule(choice, ','.join(columns), kind, named)
  of_kind = {CLASSES: _Classes, NUMBERS: _Numbers, SETS: _Members, TAGS: _Tags}.get(kind)
  if of_kind is None or not columns:
    return RowLabels(source, columns, unlabelled)
  if kind == SETS and len(columns) == 1:
    of_kind = _Lists
  return of_kind(source, columns, unlabelled)


def _named(value: int, column: Column, table: Table, row: int) -> str:
  """The name of a class by its number."""
  if not 0 <= value < len(column.classes):
    raise ValueError(
      f'{table.where(row)} has the label {value}; there are {len(column.classes)} classes, '
      'numbered from 0'
    )
  return column.classes[value]


def _unfit(where: str, value: Any, name: str, wanted: str) -> ValueError:
  return ValueError(f'{where} has {value!r:.60} as its {name!r}; it must be {wanted}')
