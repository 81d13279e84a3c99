"""From tables of typed columns, which are read by row, to data sets.

Rows of a split are mixed by a hash of their number, so that 'train[:1000]' of rows sorted by class
has all classes in it. Undivided rows are divided 80 % to 20 %, texts by a hash of what they say, so
that equal ones are in one split, and images by that of their number.

Of a table, labels are read at once, and texts if they are to be divided. Everything else is read
when a row is asked for.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..decode import decode
from ..labels import in_order
from ..source import Dataset, Example, digest, split_rows, suggestion
from . import completions
from .columns import Column, columns_of, parts_of
from .unlabelled import OPTION, Unlabelled


class Rows(Protocol):
  """A table that is read by row.

  Attributes:
    name: such as the path of its file.
    schema: a `pyarrow.Schema`.
  """

  name: str
  schema: Any

  def __len__(self) -> int: ...

  def row(self, number: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """The values of a row."""

  def chunks(self, columns: tuple[str, ...]) -> Iterator[Any]:
    """All rows of some columns in order, in tables or batches of pyarrow."""

  def may_have_nulls(self, column: str) -> bool:
    """Whether a value of a column may be missing, as far as can be told without reading it."""


def dataset_of(
  source: str, splits: Mapping[str, Sequence[Rows]], options: Mapping[str, str]
) -> Dataset:
  """The data set of tables.

  Args:
    source: as it was named, for messages.
    splits: {split: its tables}; the split '' is divided.
    options: of OPTIONS.

  Raises:
    ValueError: columns that cannot be told apart or are missing, a text that is null, or rows
      without a label, see `unlabelled`.
  """
  options = dict(options)
  choice = options.pop(OPTION, None)
  columns = {}
  for tables in splits.values():
    for table in tables:
      columns |= columns_of(table.schema)
  kind, names = parts_of(source, columns, options)
  plan = _Plan(source, kind, names, columns)
  classes = plan.label_column().classes
  unlabelled = Unlabelled(choice, names.get('label', ''), named=bool(classes))
  keys: dict[str, list] = {}
  used: list[_Split] = []
  for split, tables in splits.items():
    found = _split(split, tables, plan, unlabelled)
    if found is not None:
      keys[split] = _keys(split, found, plan)
      used.append(found)
  if not any(found.rows for found in used):
    why = '; '.join(unlabelled.left_out.values()) or 'it has no rows'
    raise ValueError(f'{source} has nothing to learn from: {why}')
  if not classes:
    classes = in_order({name for found in used for name in found.labels or ()})
  numbers = {name: number for number, name in enumerate(classes)}
  starts = np.cumsum([0, *(len(found.rows) for found in used)]).tolist()

  def read(row: int) -> Example:
    part = bisect.bisect_right(starts, row) - 1
    found = used[part]
    number = row - starts[part]
    example = _example(found.table, found.rows[number], plan)
    if found.labels is not None:
      example['label'] = numbers[found.labels[number]]
    return example

  notes = tuple(unlabelled.notes)
  return Dataset(read, split_rows(keys), list(classes), left_out=unlabelled.left_out, notes=notes)


class _Plan(NamedTuple):
  """What the columns of a source are.

  Attributes:
    source: as it was named, for messages.
    kind: of the examples, a key of GROUPS.
    names: {part of an example: its column}.
    columns: {name: what it has}.
  """

  source: str
  kind: str
  names: Mapping[str, str]
  columns: Mapping[str, Column]

  def label_column(self) -> Column:
    """The column of labels; one of nothing where examples have none."""
    if 'label' not in self.names:
      return Column('other', (), 'nothing')
    return self.columns[self.names['label']]


class _Joined:
  """The tables of a split as one."""

  def __init__(self, tables: Sequence[Rows]):
    self._tables = tables
    self._starts = np.cumsum([0, *map(len, tables)]).tolist()

  def __len__(self) -> int:
    return self._starts[-1]

  def place(self, row: int) -> tuple[Rows, int]:
    """(the table of a row, its number there)."""
    part = bisect.bisect_right(self._starts, row) - 1
    return self._tables[part], row - self._starts[part]

  def where(self, row: int) -> str:
    table, number = self.place(row)
    return f'row {number} of {table.name}'

  def values(self, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The values of some columns of each row, in order.

    Raises:
      ValueError: a text that is no UTF-8.
    """
    row = 0
    for table in self._tables:
      for chunk in table.chunks(columns):
        try:
          found = chunk.to_pylist()
        except UnicodeDecodeError as error:
          raise self._no_text(row + _first_broken(chunk), error) from error
        yield from found
        row += len(found)

  def row(self, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """The values of a row.

    Raises:
      ValueError: a text that is no UTF-8.
    """
    table, number = self.place(row)
    try:
      return table.row(number, columns)
    except UnicodeDecodeError as error:
      raise self._no_text(row, error) from error

  def _no_text(self, row: int, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f'{self.where(row)} is not UTF-8 text ({error.reason})')

  def first_null(self, column: str) -> int | None:
    """The first row that has no value in a column; the column is read if there is one."""
    for table, start in zip(self._tables, self._starts, strict=False):
      if not table.may_have_nulls(column):
        continue
      for number, values in enumerate(_Joined([table]).values((column,))):
        if values[column] is None:
          return start + number
    return None


def _first_broken(chunk) -> int:
  """The number of the first row of a table with a text that is no UTF-8."""
  for row in range(chunk.num_rows):
    try:
      chunk.slice(row, 1).to_pylist()
    except UnicodeDecodeError:
      return row
  return 0


class _Split(NamedTuple):
  """What of a split is used.

  Attributes:
    table: all its rows.
    rows: those that have what they need.
    labels: of these rows, as texts; None where examples have none.
  """

  table: _Joined
  rows: Sequence[int]
  labels: list[str] | None


def _split(
  split: str, tables: Sequence[Rows], plan: _Plan, unlabelled: Unlabelled
) -> _Split | None:
  """What of a split is used; None if it has no labels, which `unlabelled` then knows.

  Raises:
    ValueError: a column is missing or has other classes, a text is null, or a label is missing.
  """
  for table in tables:
    _check_columns(split, table, plan, unlabelled)
  if split in unlabelled.left_out:
    return None
  joined = _Joined(tables)
  rows: Sequence[int] = range(len(joined))
  labels = None
  if 'label' in plan.names:
    found = _labels(joined, plan.names['label'], plan.label_column())
    rows = unlabelled.labelled(split, tables[0].name, found, joined.where)
    labels = [found[row] for row in rows]
  if split in unlabelled.left_out:
    return None
  _check_texts(joined, plan)
  return _Split(joined, rows, labels)


def _keys(split: str, found: _Split, plan: _Plan) -> list[str | int]:
  """What decides the place of each row, and whether it is 'train' or 'test' of undivided data."""
  if split or plan.kind == 'images':
    return [str(row) for row in found.rows]
  digests = _digests(found.table, plan)
  return [digests[row] for row in found.rows]


def _check_columns(split: str, table: Rows, plan: _Plan, unlabelled: Unlabelled) -> None:
  """Raises a ValueError if a table lacks a column; one of labels leaves out its split."""
  columns = columns_of(table.schema)
  for part, name in plan.names.items():
    if name not in columns:
      said = f'{table.name} has no column {name!r}; {suggestion(name, columns)}'
      if part != 'label' or not split:
        raise ValueError(said)
      unlabelled.left_out[split] = said
    elif columns[name].classes != plan.columns[name].classes:
      raise ValueError(
        f'{table.name}: the classes of {name!r} are {list(columns[name].classes[:5])}, and '
        f'{list(plan.columns[name].classes[:5])} in other files'
      )


def _labels(table: _Joined, name: str, column: Column) -> list[Any]:
  """The label of each row as a text; as it was read where it is none."""
  known: dict[Any, Any] = {}  # each text is kept once
  found = []
  for row, values in enumerate(table.values((name,))):
    value = values[name]
    if value not in known:
      known[value] = _label(value, column, table, row)
    found.append(known[value])
  return found


def _label(value: Any, column: Column, table: _Joined, row: int) -> Any:
  if column.kind == 'class' and isinstance(value, int) and value != -1:
    if not 0 <= value < len(column.classes):
      raise ValueError(
        f'{table.where(row)} has the label {value}; there are {len(column.classes)} classes, '
        'numbered from 0'
      )
    return column.classes[value]
  if isinstance(value, float):
    if value != value:  # NaN
      return value
    if not value.is_integer():
      raise ValueError(f'{table.where(row)} has the label {value}; it must be a text or an integer')
    return str(int(value))
  if value is None:
    return value
  return str(value)


def _check_texts(table: _Joined, plan: _Plan) -> None:
  """Raises a ValueError if a text is null."""
  for part, name in plan.names.items():
    if part in ('label', 'tools') or plan.columns[name].kind != 'text':
      continue
    row = table.first_null(name)
    if row is not None:
      raise ValueError(f'{table.where(row)} has None as its {name!r}; it must be a text')


def _digests(table: _Joined, plan: _Plan) -> list[int]:
  """A digest of what each row says or asks, so that equal ones are in one split."""
  found = []
  for row, values in enumerate(table.values(tuple(plan.names.values()))):
    if plan.kind == 'texts':
      key = '\t'.join(_texts(values, plan).values())
    else:
      key = completions.asked(_written(values, table.where(row), plan))
    found.append(digest(key))
  return found


def _example(table: _Joined, row: int, plan: _Plan) -> Example:
  """A row as `Source` has it, without its label."""
  values = table.row(row, tuple(name for part, name in plan.names.items() if part != 'label'))
  where = table.where(row)
  if plan.kind == 'images':
    return {'image': _pixels(values[plan.names['image']], where)}
  if plan.kind == 'texts':
    return _texts(values, plan)
  return _written(values, where, plan)


def _texts(values: Mapping[str, Any], plan: _Plan) -> dict[str, str]:
  """{'text', ['pair']} of a row."""
  return {part: values[plan.names[part]] for part in ('text', 'pair') if part in plan.names}


def _written(values: dict[str, Any], where: str, plan: _Plan) -> Example:
  """A chat or a pair of a row."""
  # A row has all fields of its columns; those that a message has not are null.
  there = _without_nulls(values)
  names = completions.NAMES | dict(plan.names)
  return completions.example_of(where, plan.source, names, there)


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
  if isinstance(value, list):
    return [_without_nulls(inner) for inner in value]
  return value


def _pixels(value: Any, where: str) -> np.ndarray:
  """The pixels of a file's bytes, or of {'bytes', 'path'} as `datasets` stores images."""
  if isinstance(value, dict):
    path = value.get('path')
    value = value.get('bytes')
    if value is None and path is not None and Path(path).is_file():
      value = Path(path)
  if value is None:
    raise ValueError(f'{where} has no image')
  return decode(value, f'the image of {where}')
