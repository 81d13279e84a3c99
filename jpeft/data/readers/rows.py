"""Tables that are read by row, and those of a split as one."""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np


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


class Joined:
  """The tables of a split as one.

  Attributes:
    name: of the first of them.
  """

  def __init__(self, tables: Sequence[Rows]):
    self.name = tables[0].name
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
      for number, values in enumerate(Joined([table]).values((column,))):
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
