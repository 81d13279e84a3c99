"""Texts or images of one's own, with labels: CSV and JSON-lines files.

    csv:PATH, jsonl:PATH                    a file, which is divided: 80 % 'train', 20 % 'test'
    csv:FOLDER, jsonl:FOLDER                a file for each split: train.csv, test.csv
    csv:PATH?text=sentence&label=y          other columns than 'text' and 'label'
    csv:PATH?text=premise&pair=hypothesis   pairs of texts
    csv:PATH?image=file                     images: paths relative to the folder of the file
    csv:PATH?delimiter=;                    another delimiter than a comma (than a tab in .tsv)
    csv:PATH?quote=                         another quote than ", or none: quotes are letters
    csv:PATH?header=no&text=3&label=1       no line of names: columns are numbered from 0
    csv:PATH?unlabelled=skip                rows without a label are left out, see `unlabelled`

Labels are texts or integers; `classes` has them in alphabetical order, or in that of their value if
all are integers. Rows are divided and mixed by a hash of their text, so that equal texts are in one
split and a file sorted by class can be sliced. A file of a folder that lacks the column of labels,
such as GLUE's test.tsv, is left out. The TSV of GLUE has no quotes:

    csv:SST-2?text=sentence&quote=                                train.tsv, dev.tsv
    csv:MRPC?text=%231 String&pair=%232 String&label=Quality&quote=
    csv:CoLA?header=no&text=3&label=1&quote=

Where numbers are learned, a label is a number, or several columns of them:

    csv:PATH?label=score
    csv:PATH?label=width,height

Where sets of classes are learned, a label is the classes of a row, in CSV with a separator between
them and in JSON as a list; or each class has a column of 1 and 0 (true and false):

    csv:PATH?label=topics&labels_by=|
    jsonl:PATH?label=topics
    csv:PATH?label=toxic,insult,threat

An empty cell, null, or -1 in a column of a class, is not known: it is neither learned nor scored.
"""

import contextlib
import csv
import dataclasses
import functools
import itertools
import math
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft import textfiles

from ..decode import check_files, decode
from ..labels import (
  CLASSES,
  NOTHING,
  SETS,
  in_order,
  sets_of,
)
from ..source import Dataset, Example, split_rows, suggestion
from .cells import CELLS
from .files import SUFFIXES, Row, Values, examples_of, files_of, jsonl_rows, options_of
from .unlabelled import OPTION, Unlabelled, rule

COLUMNS = {'text': 'text', 'label': 'label'}  # {part of an example: its column}
PARTS = ('text', 'pair', 'image')
_OPTIONS = {
  'csv': (*PARTS, 'label', 'labels_by', OPTION, 'delimiter', 'quote', 'header'),
  'jsonl': (*PARTS, 'label', 'labels_by', OPTION),
}


@dataclasses.dataclass(frozen=True)
class _Labels:
  """How a file says the labels.

  Attributes:
    kind: of labels, see `..labels`.
    columns: that have them; one for classes, none where labels are not read.
    by: what separates the classes of a row; None if nothing does.
    unlabelled: what is done with rows without a class; None where labels are of another kind.
  """

  kind: str
  columns: tuple[str, ...]
  by: str | None = None
  unlabelled: Unlabelled | None = None

  @property
  def listed(self) -> bool:
    """Whether a single column lists the classes of a row."""
    return self.kind == SETS and len(self.columns) == 1


def csv_table(spec: str, labels: str = CLASSES) -> Dataset:
  """The rows of a CSV file, or of a folder of them; UTF-8, or UTF-16 with a byte-order mark.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no rows, a missing column or option, or a line that cannot be read.
  """
  path, options = _options(spec, 'csv', _OPTIONS['csv'])
  used = (*(options[name] for name in PARTS if name in options), *options['label'].split(','))
  read_rows = _csv_reader(spec, options, used)
  return _table(path, 'csv', options, read_rows, labels)


def _csv_reader(
  spec: str, options: dict[str, str], used: Sequence[str]
) -> Callable[[Path], Iterator[Row]]:
  """What reads the rows of a file; takes the options of the format out of `options`."""
  header = options.pop('header', 'yes')
  if header not in ('yes', 'no'):
    raise ValueError(f"csv:{spec}: header={header} must be 'yes' or 'no'")
  return functools.partial(
    csv_rows,
    delimiter=options.pop('delimiter', None),
    quote=options.pop('quote', '"'),
    header=header == 'yes',
    used=used,
  )


def jsonl_table(spec: str, labels: str = CLASSES) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, a missing column or option, or a line that cannot be read.
  """
  path, options = _options(spec, 'jsonl', _OPTIONS['jsonl'])
  return _table(path, 'jsonl', options, jsonl_rows, labels)


def _options(spec: str, kind: str, known: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
  """(path, options): the column of images, or that of texts, and that of labels are among them.

  Raises:
    ValueError: an unknown option, or both texts and images.
  """
  path, options = options_of(spec, kind, known, {'label': COLUMNS['label']})
  if 'image' not in options:
    return path, COLUMNS | options
  for other in ('text', 'pair'):
    if other in options:
      raise ValueError(
        f'{kind}:{spec}: an example is an image or a text: leave out image or {other}'
      )
  return path, options


# ---- Rows that are to be labelled.


class Asked(NamedTuple):
  """A row of a table without its label.

  Attributes:
    line: its number in the file; that of the last one if it has several.
    kept: {column: value} of the columns that are to be kept.
    example: {'text', ['pair']}, or {'image'}, the path of one.
  """

  line: int
  kept: Values
  example: Example


def kind_of_table(spec: str) -> str | None:
  """'csv' or 'jsonl' for PATH?options by the suffix of the path; None for any other file."""
  suffix = Path(spec.partition('?')[0]).suffix.lower()
  for kind in _OPTIONS:
    if suffix in SUFFIXES[kind]:
      return kind
  return None


def like_columns(spec: str, name: str) -> str:
  """PATH?options of a table, with the options of a data set where it has none of its own.

  Args:
    spec: of a table, see `kind_of_table`; its own options come first.
    name: of the data set, such as 'csv:reviews.csv?text=sentence&label=y'.
  """
  path, _, own = spec.partition('?')
  known = _OPTIONS[kind_of_table(spec)]
  options = {}
  for key, value in urllib.parse.parse_qsl(name.partition('?')[2], keep_blank_values=True):
    if key in known:
      options[key] = value
  options |= urllib.parse.parse_qsl(own, keep_blank_values=True)
  return f'{path}?{urllib.parse.urlencode(options)}'


def asked(spec: str) -> list[Asked]:
  """The rows of one table, in their order; a column of labels is not read.

  Args:
    spec: PATH?options as those of `csv:` and `jsonl:`, and keep=COLUMN,COLUMN.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no rows, a missing column or option, or a line that cannot be read.
  """
  kind = kind_of_table(spec)
  path, options = _options(spec, kind, (*_OPTIONS[kind], 'keep'))
  options.pop(OPTION, None)  # of labels
  keep = [column for column in options.pop('keep', '').split(',') if column]
  columns = {part: options[part] for part in PARTS if part in options}
  read_rows = jsonl_rows
  if kind == 'csv':
    read_rows = _csv_reader(spec, options, tuple(columns.values()))
  if not path.is_file():
    raise FileNotFoundError(f'there is no file {path}')

  def row(line: int, values: Values) -> Asked:
    for column in keep:
      if column not in values:
        raise ValueError(
          f'line {line} of {path} has no column {column!r} to keep; {suggestion(column, values)}'
        )
    kept = {column: values[column] for column in keep}
    example = _example(path, columns, _Labels(NOTHING, ()), line, values)
    del example['label']
    if 'image' in example:
      example['image'] = path.parent / example['image']
    return Asked(line, kept, example)

  return examples_of(path, read_rows(path), row)


# ---- Rows with labels.


def _table(
  path: Path,
  kind: str,
  options: dict[str, str],
  read_rows: Callable[[Path], Iterator[Row]],
  labels: str,
) -> Dataset:
  """The examples of all files.

  Args:
    path: of a file or a folder.
    kind: 'csv' or 'jsonl'.
    options: {part of an example: its column}, labels_by and unlabelled.
    read_rows: file -> its rows.
    labels: the kind that is wanted.
  """
  examples = []
  keys = {}
  files = files_of(path, kind)
  said = _labels_of(files, options, read_rows, labels)
  left_out = _without_column(files, said, read_rows)
  for split, file in files.items():
    if split in left_out:
      continue
    numbered = functools.partial(_numbered, file, options, said)
    found = _labelled(split, file, examples_of(file, read_rows(file), numbered), said)
    if not found:
      continue
    keys[split] = [_key(example) for example in found]
    if 'image' in options:
      found = [example | {'image': file.parent / example['image']} for example in found]
    examples += found
  notes: tuple[str, ...] = ()
  if said.unlabelled is not None:
    left_out |= said.unlabelled.left_out
    notes = tuple(said.unlabelled.notes)
  if not examples:
    raise ValueError(f'there is nothing to learn: {"; ".join(left_out.values())}')
  classes, values = _values([example['label'] for example in examples], said)
  if 'image' in options:
    check_files(list(dict.fromkeys(example['image'] for example in examples)))

  def read(row: int) -> Example:
    example = examples[row] | {'label': values[row]}
    if 'image' in example:
      example['image'] = decode(example['image'], str(example['image']))
    return example

  return Dataset(
    read,
    split_rows(keys),
    classes,
    left_out=left_out,
    labels=labels,
    label_of=values.__getitem__,
    notes=notes,
  )


def _labelled(
  split: str, file: Path, numbered: list[tuple[int, Example]], labels: _Labels
) -> list[Example]:
  """The examples of a file that have a label, of all with their lines."""
  if labels.unlabelled is None:
    return [example for _, example in numbered]

  def where(i: int) -> str:
    return f'line {numbered[i][0]} of {file}'

  said = [example['label'] for _, example in numbered]
  kept = labels.unlabelled.labelled(split, str(file), said, where)
  return [numbered[i][1] | {'label': str(said[i])} for i in kept]


def _labels_of(
  files: dict[str, Path],
  options: dict[str, str],
  read_rows: Callable[[Path], Iterator[Row]],
  kind: str,
) -> _Labels:
  """How the files say the labels: a name with commas is several columns, if it is no column itself.

  Args:
    files: of the splits.
    options: what they say of labels is taken out.
    read_rows: file -> its rows.
    kind: of labels that is wanted.

  Raises:
    ValueError: labels_by or unlabelled where it says nothing.
  """
  column = options.pop('label')
  by = options.pop('labels_by', None)
  choice = options.pop(OPTION, None)
  unlabelled = rule(choice, column, kind)
  if kind == NOTHING:
    return _Labels(kind, ())
  columns: tuple[str, ...] = (column,)
  there = any(column in values for file in files.values() for _, values in _first(read_rows, file))
  if kind != CLASSES and not there:
    columns = tuple(column.split(','))
  if by is not None and (kind != SETS or len(columns) > 1 or not by):
    raise ValueError(
      f'labels_by={by} separates the classes that one column lists, where sets of classes are '
      "learned (config.task='multilabel'): leave it out"
    )
  return _Labels(kind, columns, by, unlabelled)


def _first(read_rows: Callable[[Path], Iterator[Row]], file: Path) -> list[Row]:
  """The first row of a file, if there is one."""
  return list(itertools.islice(read_rows(file), 1))


def _values(said: Sequence[Any], labels: _Labels) -> tuple[list[str], Sequence[Any]]:
  """(names, the label of each row), see `..labels`."""
  if labels.kind == CLASSES:
    classes = in_order(set(said))
    numbers = {name: i for i, name in enumerate(classes)}
    return classes, [numbers[label] for label in said]
  if labels.listed:
    classes = in_order({name for names in said for name in names})
    return classes, sets_of(said, classes)
  return list(labels.columns), np.array(said, np.float32)


def _without_column(
  files: dict[str, Path], labels: _Labels, read_rows: Callable[[Path], Iterator[Row]]
) -> dict[str, str]:
  """{split: why it is left out} of the files without a column of labels, if another has one."""
  left_out = {}
  for split, file in files.items():
    for _, values in _first(read_rows, file):
      for label in labels.columns:
        if label not in values:
          left_out[split] = f'{file} has no column {label!r}; {suggestion(label, values)}'
  if len(left_out) == len(files):
    return {}  # to be told with the line
  return left_out


def _key(example: dict[str, str]) -> str:
  """The texts or the image of an example, which decide its place: equal ones are in one split."""
  return '\t'.join(example[name] for name in PARTS if name in example)


def csv_rows(
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


def _numbered(
  file: Path, columns: dict[str, str], labels: _Labels, line: int, values: Values
) -> tuple[int, Example]:
  """(line, its example)."""
  return line, _example(file, columns, labels, line, values)


def _example(
  file: Path, columns: dict[str, str], labels: _Labels, line: int, values: Values
) -> dict[str, Any]:
  """The texts {'text', ['pair']} or {'image'} of a row, and its label.

  The label is a text for one class, or what says that there is none; a list of texts where a column
  lists classes; else a list of numbers, one for each column.
  """
  example: dict[str, Any] = {}
  for name, column in columns.items():
    value = _cell(file, line, name, column, values)
    if not isinstance(value, str):
      raise _unfit(file, line, column, value, 'a text')
    if name == 'image' and not (file.parent / value).is_file():
      raise FileNotFoundError(f'line {line} of {file}: there is no file {file.parent / value}')
    example[name] = value
  said = []
  for column in labels.columns:
    value = _cell(file, line, 'label', column, values)
    if labels.unlabelled is not None and labels.unlabelled.missing(value):
      said.append(value)
      continue
    if labels.by is not None and isinstance(value, str):
      value = [name.strip() for name in value.split(labels.by)] if value.strip() else []
    if labels.listed and not isinstance(value, list):
      wanted = (
        'a list; in a text say what separates its classes (labels_by=;), or name a column of 1 and '
        '0 for each class (label=a,b)'
      )
      raise _unfit(file, line, column, value, wanted)
    try:
      said.append(CELLS[labels.kind, labels.listed](value))
    except ValueError as error:
      raise _unfit(file, line, column, value, str(error)) from None
  example['label'] = said
  if not labels.columns:
    return example
  if labels.kind == CLASSES or labels.listed:
    (example['label'],) = said
  elif all(math.isnan(value) for value in said):
    raise ValueError(f'line {line} of {file} has no label: {", ".join(labels.columns)} are empty')
  return example


def _cell(file: Path, line: int, name: str, column: str, values: Values) -> Any:
  """The value of a column that a row must have."""
  if column not in values:
    raise ValueError(
      f'line {line} of {file} has no column {column!r} (or name another one, '
      f'{file.name}?{name}=COLUMN); {suggestion(column, values)}'
    )
  return values[column]


def _unfit(file: Path, line: int, column: str, value: Any, wanted: str) -> ValueError:
  return ValueError(f'line {line} of {file} has {value!r} as its {column!r}; it must be {wanted}')
