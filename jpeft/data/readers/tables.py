"""Texts of one's own, with labels: CSV and JSON-lines files.

    csv:PATH, jsonl:PATH                    a file, which is divided: 80 % 'train', 20 % 'test'
    csv:FOLDER, jsonl:FOLDER                a file for each split: train.csv, test.csv
    csv:PATH?text=sentence&label=y          other columns than 'text' and 'label'
    csv:PATH?text=premise&pair=hypothesis   pairs of texts
    csv:PATH?delimiter=;                    another delimiter than a comma (than a tab in .tsv)

Labels are texts or integers; `classes` has them in alphabetical order, or in that of their value if
all are integers. Rows are divided and mixed by a hash of their text, so that equal texts are in one
split and a file sorted by class can be sliced.
"""

import csv
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from ..source import Dataset, Example, split_rows, suggestion
from .files import Row, Values, examples_of, files_of, jsonl_rows, options_of

COLUMNS = {'text': 'text', 'label': 'label'}  # {part of an example: its column}


def csv_table(spec: str) -> Dataset:
  """The rows of a CSV file, or of a folder of them; UTF-8 with a header line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no rows, a missing column or option, or a line that cannot be read.
  """
  path, options = options_of(spec, 'csv', ('text', 'pair', 'label', 'delimiter'), COLUMNS)
  delimiter = options.pop('delimiter', None)
  return _table(path, 'csv', options, functools.partial(_csv_rows, delimiter=delimiter))


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
  for split, file in files_of(path, kind).items():
    found = examples_of(file, read_rows(file), functools.partial(_example, file, columns))
    keys[split] = [_key(example) for example in found]
    examples += found
  classes = _classes({example['label'] for example in examples})
  labels = {name: label for label, name in enumerate(classes)}

  def read(row: int) -> Example:
    example = examples[row]
    return example | {'label': labels[example['label']]}

  return Dataset(read, split_rows(keys), classes)


def _key(example: dict[str, str]) -> str:
  """The texts of an example, which decide its place: equal ones are in one split."""
  return '\t'.join(example[name] for name in ('text', 'pair') if name in example)


def _csv_rows(file: Path, delimiter: str | None) -> Iterator[Row]:
  if delimiter is None:
    delimiter = '\t' if file.suffix == '.tsv' else ','
  if len(delimiter) != 1:
    raise ValueError(f'the delimiter {delimiter!r} is not one character')
  with file.open(encoding='utf-8-sig', newline='') as opened:
    reader = csv.DictReader(opened, delimiter=delimiter, strict=True)
    try:
      for row in reader:
        if None in row:  # the key of fields that have no name in the header
          raise ValueError(
            f'line {reader.line_num} of {file} has more fields than the header; put quotes '
            f'around texts with {delimiter!r} in them'
          )
        yield reader.line_num, row
    except csv.Error as error:
      raise ValueError(f'{file} is no CSV after line {reader.line_num} ({error})') from error


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
