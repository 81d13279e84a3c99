"""From tables of typed columns, which are read by row, to data sets.

Rows of a split are mixed by a hash of their number, so that 'train[:1000]' of rows sorted by class
has all classes in it. Undivided rows are divided 80 % to 20 %, texts by a hash of what they say, so
that equal ones are in one split, and images by that of their number.

Of a table, labels are read at once (see `row_labels`), and texts if they are to be divided.
Everything else is read when a row is asked for, answers in texts too, which are checked with their
text.
"""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..decode import decode
from ..labels import CLASSES, TAGS
from ..source import Dataset, Example, digest, split_rows, suggestion
from . import completions, preferences
from .columns import LABELS, NAMES, Column, Parts, check_types, columns_of, parts_of
from .questions import question_of
from .row_labels import RowLabels, row_labels
from .rows import Joined, Rows
from .tags import sentence_of, words_of
from .unlabelled import OPTION


def dataset_of(
  source: str,
  splits: Mapping[str, Sequence[Rows]],
  options: Mapping[str, str],
  labels: str = CLASSES,
) -> Dataset:
  """The data set of tables.

  Args:
    source: as it was named, for messages.
    splits: {split: its tables}; the split '' is divided.
    options: of OPTIONS.
    labels: the kind that is wanted, see `..labels`.

  Raises:
    ValueError: columns that cannot be told apart or are missing, a text that is null, or rows
      without a label, see `unlabelled`.
  """
  options = dict(options)
  choice = options.pop(OPTION, None)
  tag_names = options.pop(NAMES, None)
  columns: dict[str, Column] = {}
  for tables in splits.values():
    for table in tables:
      for name, column in columns_of(table.schema).items():
        if column.kind != 'null' or name not in columns:
          columns[name] = column
  parts = parts_of(source, columns, options, labels)
  plan = _Plan(source, labels, parts, columns)
  learned = {name: columns[name] for name in plan.learned()}
  if tag_names is not None:
    learned = _with_names(source, labels, learned, tag_names)
  found = row_labels(source, labels, learned, choice)
  keys: dict[str, list] = {}
  used: list[_Split] = []
  for split, tables in splits.items():
    rows = _split(split, tables, plan, found)
    if rows is not None:
      keys[split] = _keys(split, rows, plan)
      used.append(rows)
  if not any(part.rows for part in used):
    why = '; '.join(found.left_out.values()) or 'it has no rows'
    raise ValueError(f'{source} has nothing to learn from: {why}')
  classes = found.classes()
  numbers = {name: number for number, name in enumerate(classes)}
  named_tags = None
  if labels == TAGS:
    (column,) = learned.values()
    named_tags = column.classes or None
  starts = np.cumsum([0, *(len(part.rows) for part in used)]).tolist()

  def read(row: int) -> Example:
    part = bisect.bisect_right(starts, row) - 1
    table = used[part].table
    number = used[part].rows[row - starts[part]]
    if labels == TAGS:
      values = table.row(number, tuple(plan.names.values()))
      sentence = sentence_of(table.where(number), source, plan.names, named_tags, values)
      return {'words': sentence['words'], 'label': [numbers[tag] for tag in sentence['tags']]}
    example = _example(table, number, plan)
    if parts.label:
      example['label'] = found.of(row)
    return example

  return Dataset(
    read,
    split_rows(keys),
    classes,
    left_out=found.left_out,
    labels=labels,
    label_of=found.of if parts.label else None,
    notes=found.notes,
  )


def _with_names(
  source: str, labels: str, columns: Mapping[str, Column], text: str
) -> dict[str, Column]:
  """The column of tags with the names that an option gives its numbers.

  Raises:
    ValueError: there are no tags, or they have names.
  """
  if labels != TAGS:
    raise ValueError(
      f"{source}: {NAMES}= gives names to tags, which config.task='tokens' learns: leave it out"
    )
  named = {}
  for name, column in columns.items():
    if column.classes:
      raise ValueError(f'{source}: the tags of {name!r} have names: leave out {NAMES}=')
    named[name] = column._replace(classes=tuple(text.split(',')))
  return named


class _Plan(NamedTuple):
  """What the columns of a source are.

  Attributes:
    source: as it was named, for messages.
    labels: the kind that is wanted.
    parts: which columns are what.
    columns: {name: what it has}.
  """

  source: str
  labels: str
  parts: Parts
  columns: Mapping[str, Column]

  @property
  def kind(self) -> str:
    """Of the examples, such as 'texts'."""
    return self.parts.examples

  @property
  def names(self) -> Mapping[str, str]:
    """{part of an example: its column}, without the label."""
    return self.parts.names

  def learned(self) -> tuple[str, ...]:
    """The columns that say what is learned; a split without them is left out."""
    names = self.names.items()
    return self.parts.label + tuple(name for part, name in names if part in LABELS)


class _Split(NamedTuple):
  """What of a split is used.

  Attributes:
    table: all its rows.
    rows: those that have what they need.
  """

  table: Joined
  rows: Sequence[int]


def _split(split: str, tables: Sequence[Rows], plan: _Plan, labels: RowLabels) -> _Split | None:
  """What of a split is used; None if it has no labels, which `labels` then knows.

  Raises:
    ValueError: a column is missing or has other classes, a text is null, or a label is missing.
  """
  for table in tables:
    _check_columns(split, table, plan, labels)
  if split in labels.left_out:
    return None
  joined = Joined(tables)
  rows = labels.read(split, joined)
  if split in labels.left_out:
    return None
  _check_texts(joined, plan)
  return _Split(joined, rows)


def _keys(split: str, found: _Split, plan: _Plan) -> list[str | int]:
  """What decides the place of each row, and whether it is 'train' or 'test' of undivided data."""
  if split or plan.kind == 'images':
    return [str(row) for row in found.rows]
  digests = _digests(found.table, plan)
  return [digests[row] for row in found.rows]


def _check_columns(split: str, table: Rows, plan: _Plan, labels: RowLabels) -> None:
  """Raises a ValueError if a column is missing or another; one of labels leaves out its split."""
  columns = columns_of(table.schema)
  learned = plan.learned()
  check_types(table.name, columns, plan.parts, plan.labels)
  for name in (*plan.names.values(), *plan.parts.label):
    if name not in columns:
      said = f'{table.name} has no column {name!r}; {suggestion(name, columns)}'
      if name not in learned or not split:
        raise ValueError(said)
      labels.left_out[split] = said
    elif columns[name].kind != 'null' and columns[name].classes != plan.columns[name].classes:
      raise ValueError(
        f'{table.name}: the classes of {name!r} are {list(columns[name].classes[:5])}, and '
        f'{list(plan.columns[name].classes[:5])} in other files'
      )


def _check_texts(table: Joined, plan: _Plan) -> None:
  """Raises a ValueError if a text is null."""
  for part, name in plan.names.items():
    if part == 'tools' or plan.columns[name].kind != 'text':
      continue
    row = table.first_null(name)
    if row is not None:
      raise ValueError(f'{table.where(row)} has None as its {name!r}; it must be a text')


# The part whose texts decide the split of a row; of others, what is asked.
_DECIDES = {'sentences': 'tokens', 'questions': 'context'}


def _digests(table: Joined, plan: _Plan) -> list[int]:
  """A digest of what each row says or asks, so that equal ones are in one split."""
  names = tuple(plan.names.values())
  if plan.kind in _DECIDES:
    names = (plan.names[_DECIDES[plan.kind]],)
  found = []
  for row, values in enumerate(table.values(names)):
    if plan.kind == 'texts':
      key = '\t'.join(_texts(values, plan).values())
    elif plan.kind == 'sentences':
      key = ' '.join(words_of(table.where(row), names[0], values[names[0]]))
    elif plan.kind == 'questions':
      key = values[names[0]]
    elif plan.kind == 'preferences':
      key = preferences.asked_of(_preferred(values, table.where(row), plan))
    else:
      key = completions.asked(_written(values, table.where(row), plan))
    found.append(digest(key))
  return found


def _example(table: Joined, row: int, plan: _Plan) -> Example:
  """A row as `Source` has it, without its label."""
  values = table.row(row, tuple(plan.names.values()))
  where = table.where(row)
  if plan.kind == 'images':
    return {'image': _pixels(values[plan.names['image']], where)}
  if plan.kind == 'texts':
    return _texts(values, plan)
  if plan.kind == 'questions':
    return question_of(where, plan.source, plan.names, values)
  if plan.kind == 'preferences':
    return _preferred(values, where, plan)
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


def _preferred(values: dict[str, Any], where: str, plan: _Plan) -> Example:
  """Two answers of a row."""
  names = preferences.NAMES | dict(plan.names)
  return preferences.preference_of(where, plan.source, names, _without_nulls(values))


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
