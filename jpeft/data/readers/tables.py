"""Texts of one's own, with labels: CSV and JSON-lines files.

    csv:PATH, jsonl:PATH                    a file: split by a hash of the text: 80 % 'train', 20 % 'test'
    csv:FOLDER, jsonl:FOLDER                a file for each split: train.csv, test.csv
    csv:PATH?text=sentence&label=y          other columns than 'text' and 'label'
    csv:PATH?text=premise&pair=hypothesis   pairs of texts
    csv:PATH?delimiter=;                    another delimiter than a comma (a tab in files named .tsv)

Labels are texts or integers; `classes` has them in alphabetical order, or in that of their value if
all are integers. Rows are mixed by a hash of their text, so that a file sorted by class can be
sliced.
"""

import csv
import json
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..source import Dataset, divided, nearest, shuffled

Row = tuple[int, dict[str, Any]]  # line in the file, values
LABELLED = {'text': 'text', 'label': 'label'}


def csv_table(spec: str) -> Dataset:
  """The rows of a CSV file, or of a folder of them; UTF-8 with a header line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no rows, a missing column or option, or a line that cannot be read.
  """
  path, options = options_of(spec, 'csv', ('text', 'pair', 'label', 'delimiter'), LABELLED)
  return _table(path, 'csv', options, _csv_rows)


def jsonl_table(spec: str) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, a missing column or option, or a line that cannot be read.
  """
  path, options = options_of(spec, 'jsonl', ('text', 'pair', 'label'), LABELLED)
  return _table(path, 'jsonl', options, jsonl_rows)


def options_of(
  spec: str, kind: str, known: tuple[str, ...], default: dict[str, str]
) -> tuple[Path, dict[str, str]]:
  """(path, options) of PATH?name=value&...

  Raises:
    ValueError: an option that is not known.
  """
  path, _, query = spec.partition('?')
  options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
  for name in options:
    if name not in known:
      raise ValueError(f'{kind}:{spec} has the unknown option {name!r}; {nearest(name, known)}')
  return Path(path).expanduser(), default | options


def _table(path: Path, kind: str, options: dict[str, str], read_rows) -> Dataset:
  columns = {name: column for name, column in options.items() if name != 'delimiter'}
  examples, splits = [], {}
  for name, file in files_of(path, kind).items():
    found = examples_of(
      file, read_rows(file, options), lambda line, values: _example(file, line, values, columns)
    )
    keys = ['\t'.join(example[c] for c in ('text', 'pair') if c in example) for example in found]
    rows = {name: shuffled(keys)} if name else divided(keys)
    splits |= {split: [len(examples) + i for i in order] for split, order in rows.items()}
    examples += found
  classes = _classes({example['label'] for example in examples})
  labels = {label: i for i, label in enumerate(classes)}
  return Dataset(
    lambda row: examples[row] | {'label': labels[examples[row]['label']]}, splits, classes
  )


def examples_of(
  file: Path, rows: Iterator[Row], example: Callable[[int, dict], dict]
) -> list[dict]:
  """example(line, values) of all rows of a file.

  Raises:
    ValueError: there are none, or they are not UTF-8.
  """
  try:
    found = [example(*row) for row in rows]
  except UnicodeDecodeError as error:
    raise ValueError(f'{file} is not UTF-8 text ({error})') from error
  if not found:
    raise ValueError(f'{file} is empty: there is no row of data in it')
  return found


def files_of(path: Path, kind: str) -> dict[str, Path]:
  """{split: file}, the split '' for a file that is to be divided."""
  if path.is_file():
    return {'': path}
  if path.is_dir():
    suffixes = ('.csv', '.tsv') if kind == 'csv' else ('.jsonl',)
    files = {p.stem: p for p in sorted(path.iterdir()) if p.suffix in suffixes}
    if not files:
      raise ValueError(
        f'no .{kind} files found in {path}: it needs one for each split, such as train.{kind}'
      )
    return files
  beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
  raise FileNotFoundError(f'there is no file {path}; {nearest(path.name, beside)}')


def _csv_rows(file: Path, options: dict[str, str]) -> Iterator[Row]:
  delimiter = options.get('delimiter', '\t' if file.suffix == '.tsv' else ',')
  if len(delimiter) != 1:
    raise ValueError(f'the delimiter {delimiter!r} is not one character')
  with file.open(encoding='utf-8-sig', newline='') as opened:
    reader = csv.DictReader(opened, delimiter=delimiter, strict=True)
    try:
      for row in reader:
        if None in row:
          raise ValueError(
            f'line {reader.line_num} of {file} has more fields than the header; put quotes '
            f'around texts with {delimiter!r} in them'
          )
        yield reader.line_num, row
    except csv.Error as error:
      raise ValueError(f'{file} is no CSV after line {reader.line_num} ({error})') from error


def jsonl_rows(file: Path, options: dict[str, str]) -> Iterator[Row]:
  """(line number, object) of each line that is not empty."""
  with file.open(encoding='utf-8-sig') as opened:
    for line, text in enumerate(opened, 1):
      if text.strip():
        try:
          row = json.loads(text)
        except json.JSONDecodeError as error:
          raise ValueError(f'line {line} of {file} is no JSON ({error})') from error
        if not isinstance(row, dict):
          raise ValueError(f'line {line} of {file} is a JSON {type(row).__name__}, not an object')
        yield line, row


def _example(
  file: Path, line: int, values: dict[str, Any], columns: dict[str, str]
) -> dict[str, str]:
  out = {}
  for name, column in columns.items():
    if column not in values:
      raise ValueError(
        f'line {line} of {file} has no column {column!r} (or name another one, '
        f'{file.name}?{name}=COLUMN); {nearest(column, values)}'
      )
    value = values[column]
    if not isinstance(value, (str, int) if name == 'label' else str) or (
      name == 'label' and value == ''
    ):
      raise ValueError(
        f'line {line} of {file} has {value!r} as its {column!r}; it must be '
        f'{"a text or an integer" if name == "label" else "a text"}'
      )
    out[name] = str(value)
  return out


def _classes(labels: set[str]) -> list[str]:
  try:
    return sorted(labels, key=int)
  except ValueError:
    return sorted(labels)
