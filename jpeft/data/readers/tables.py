"""Texts of one's own, with labels: CSV and JSON-lines files.

    csv:PATH, jsonl:PATH                    a file, which is divided: 80 % 'train', 20 % 'test'
    csv:FOLDER, jsonl:FOLDER                a file for each split: train.csv, test.csv
    csv:PATH?text=sentence&label=y          other columns than 'text' and 'label'
    csv:PATH?text=premise&pair=hypothesis   pairs of texts
    csv:PATH?delimiter=;                    another delimiter than a comma (than a tab in .tsv)
    csv:PATH?quote=                         another quote than ", or none: quotes are letters
    csv:PATH?header=no&text=3&label=1       no line of names: columns are numbered from 0

Labels are texts or integers; `classes` has them in alphabetical order, or in that of their value if
all are integers. Rows are divided and mixed by a hash of their text, so that equal texts are in one
split and a file sorted by class can be sliced. A file of a folder that lacks the column of labels,
such as GLUE's test.tsv, is left out. The TSV of GLUE has no quotes:

    csv:SST-2?text=sentence&quote=                                train.tsv, dev.tsv
    csv:MRPC?text=%231 String&pair=%232 String&label=Quality&quote=
    csv:CoLA?header=no&text=3&label=1&quote=
"""

import contextlib
import csv
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jpeft import textfiles

from ..source import Dataset, Example, split_rows, suggestion
from .files import Row, Values, examples_of, files_of, jsonl_rows, options_of

COLUMNS = {'text': 'text', 'label': 'label'}  # {part of an example: its column}


def csv_table(spec: str) -> Dataset:
  """The rows of a CSV file, or of a folder of them; UTF-8, or UTF-16 with a byte-order mark.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no rows, a missing column or option, or a line that cannot be read.
  """
  known = ('text', 'pair', 'label', 'delimiter', 'quote', 'header')
  path, options = options_of(spec, 'csv', known, COLUMNS)
  header = options.pop('header', 'yes')
  if header not in ('yes', 'no'):
    raise ValueError(f"csv:{spec}: header={header} must be 'yes' or 'no'")
  read_rows = functools.partial(
    _csv_rows,
    delimiter=options.pop('delimiter', None),
    quote=options.pop('quote', '"'),
    header=header == 'yes',
    used=tuple(options.values()),
  )
  return _table(path, 'csv', options, read_rows)


def jsonl_table(spec: str) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, a missing column or option, or a line that cannot be read.
  """
  path, columns = options_of(spec, 'jsonl', ('text', 'pair', 'label'), COLUMNS)
  return _table(path, 'jsonl', columns, jsonl_rows)


def _table(
  path: Path, kind: str, columns: dict[str, str], read_rows: Callable[[Path], Iterator[Row]]
) -> Dataset:
  examples = []
  keys = {}
  files = files_of(path, kind)
  left_out = _unlabelled(files, columns['label'], read_rows)
  for split, file in files.items():
    if split in left_out:
      continue
    found = examples_of(file, read_rows(file), functools.partial(_example, file, columns))
    keys[split] = [_key(example) for example in found]
    examples += found
  classes = _classes({example['label'] for example in examples})
  labels = {name: label for label, name in enumerate(classes)}

  def read(row: int) -> Example:
    example = examples[row]
    return example | {'label': labels[example['label']]}

  return Dataset(read, split_rows(keys), classes, left_out=left_out)


def _unlabelled(
  files: dict[str, Path], label: str, read_rows: Callable[[Path], Iterator[Row]]
) -> dict[str, str]:
  """{split: why it is left out} of the files without a column of labels, if another has one."""
  left_out = {}
  for split, file in files.items():
    _, values = next(read_rows(file), (0, {label: None}))
    if label not in values:
      left_out[split] = f'{file} has no column {label!r}; {suggestion(label, values)}'
  if len(left_out) == len(files):
    return {}  # to be told with the line
  return left_out


def _key(example: dict[str, str]) -> str:
  """The texts of an example, which decide its place: equal ones are in one split."""
  return '\t'.join(example[name] for name in ('text', 'pair') if name in example)


def _csv_rows(
  file: Path, delimiter: str | None, quote: str, header: bool, used: Sequence[str]
) -> Iterator[Row]:
  """(line number, {column: text}) of each row.

  Args:
    file: its path.
    delimiter: between fields; None for that of the suffix.
    quote: what fields with delimiters are put in; '' if nothing is.
    header: whether the first row has the names of the columns, else they are '0', '1', ...
    used: the columns that are read, of which there must not be two.
  """
  if delimiter is None:
    delimiter = '\t' if file.suffix == '.tsv' else ','
  if len(delimiter) != 1:
    raise ValueError(f'the delimiter {delimiter!r} is not one character')
  if len(quote) > 1:
    raise ValueError(f'the quote {quote!r} is not one character, or none')
  quoting: dict[str, Any] = {'quotechar': quote, 'strict': True}
  if not quote:
    quoting = {'quoting': csv.QUOTE_NONE}
  with textfiles.opened(file, newline='') as lines, _long_fields():
    names = None
    if not header:
      width = len(next(csv.reader(lines, delimiter=delimiter, **quoting), ()))
      names = [str(number) for number in range(width)]
      lines.seek(0)
    reader = csv.DictReader(lines, names, delimiter=delimiter, **quoting)
    try:
      for name in used:
        if (reader.fieldnames or []).count(name) > 1:
          raise ValueError(f'{file} has several columns {name!r}: give them other names')
      for row in reader:
        if None in row:  # the key of fields that have no name in the header
          raise ValueError(
            f'line {reader.line_num} of {file} has more fields than the header; put quotes '
            f'around texts with {delimiter!r} in them'
          )
        yield reader.line_num, row
    except csv.Error as error:
      raise ValueError(
        f'{file} is no CSV after line {reader.line_num} ({error}); if its quotes are letters, say '
        f'{file.name}?quote='
      ) from error


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
  """While it is open, fields may be longer than the 131,072 characters that Python allows."""
  before = csv.field_size_limit(2**31 - 1)
  try:
    yield
  finally:
    csv.field_size_limit(before)


def _example(file: Path, columns: dict[str, str], line: int, values: Values) -> dict[str, str]:
  """{'text', ['pair'], 'label'} of a row, all of them texts."""
  example = {}
  for name, column in columns.items():
    if column not in values:
      raise ValueError(
        f'line {line} of {file} has no column {column!r} (or name another one, '
        f'{file.name}?{name}=COLUMN); {suggestion(column, values)}'
      )
    value = values[column]
    if name == 'label':
      valid = isinstance(value, (str, int)) and value != ''
      wanted = 'a text or an integer'
    else:
      valid = isinstance(value, str)
      wanted = 'a text'
    if not valid:
      raise ValueError(
        f'line {line} of {file} has {value!r} as its {column!r}; it must be {wanted}'
      )
    example[name] = str(value)
  return example


def _classes(labels: set[str]) -> list[str]:
  try:
    return sorted(labels, key=int)
  except ValueError:
    return sorted(labels)
