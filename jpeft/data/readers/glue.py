"""The tasks of GLUE in the files of their download, or in CSV and JSON-lines exports of them.

    glue:FOLDER/CoLA            FOLDER/CoLA/train.tsv, dev.tsv, test.tsv
    glue:FOLDER?task=cola       the same, or the files of FOLDER itself, whatever it is called
    glue:PATH?malformed=skip    lines that cannot be read are left out, and counted
    glue:PATH?unlabelled=skip   rows without a label are left out, see `unlabelled`

Wang et al., 2018 (arXiv 1804.07461). A task says which columns are its texts, their names in the
exports of the package `datasets` among them, and what its classes are called, in the order of
their numbers there. Splits are 'train', 'dev' and 'test', of MNLI 'dev_matched' and
'dev_mismatched'; files called validation are 'dev'. A split without labels, as the 'test' of the
download, is left out.

A .tsv file has no quotes, and a line that has not as many fields as the first one is malformed; the
published QQP has a few. A .csv file has quotes, a .jsonl or .json file an object a line.
"""

import itertools
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft import textfiles

from ..labels import CLASSES, NUMBERS, TASK_OF, number
from ..source import Dataset, Example, split_rows, suggestion
from .files import MALFORMED, Values, jsonl_rows, options_of, skips
from .tables import csv_rows
from .unlabelled import OPTION, Unlabelled


class Task(NamedTuple):
  """A task of GLUE.

  Attributes:
    folder: of the download.
    columns: {'text', ['pair'], 'label'}, each with the names that files give it.
    classes: in the order of their numbers; none where a score is learned.
    sizes: {split: rows of the published one}.
    fields: names of the columns of files without a line of names; none where all have one.
  """

  folder: str
  columns: dict[str, tuple[str, ...]]
  classes: tuple[str, ...]
  sizes: dict[str, int]
  fields: tuple[str, ...] = ()


_PAIR = {'text': ('sentence1',), 'pair': ('sentence2',), 'label': ('label',)}
_ENTAILED = ('entailment', 'not_entailment')
TASKS = {
  'cola': Task(
    'CoLA',
    {'text': ('sentence',), 'label': ('label',)},
    ('unacceptable', 'acceptable'),
    {'train': 8_551, 'dev': 1_043},
    fields=('source', 'label', 'mark', 'sentence'),
  ),
  'sst2': Task(
    'SST-2',
    {'text': ('sentence',), 'label': ('label',)},
    ('negative', 'positive'),
    {'train': 67_349, 'dev': 872},
  ),
  'mrpc': Task(
    'MRPC',
    {
      'text': ('#1 String', 'sentence1'),
      'pair': ('#2 String', 'sentence2'),
      'label': ('Quality', 'label'),
    },
    ('not_equivalent', 'equivalent'),
    {'train': 3_668, 'dev': 408},
  ),
  'stsb': Task('STS-B', _PAIR | {'label': ('score', 'label')}, (), {'train': 5_749, 'dev': 1_500}),
  'qqp': Task(
    'QQP',
    {'text': ('question1',), 'pair': ('question2',), 'label': ('is_duplicate', 'label')},
    ('not_duplicate', 'duplicate'),
    {'train': 363_846, 'dev': 40_430},
  ),
  'mnli': Task(
    'MNLI',
    {
      'text': ('sentence1', 'premise'),
      'pair': ('sentence2', 'hypothesis'),
      'label': ('gold_label', 'label'),
    },
    ('entailment', 'neutral', 'contradiction'),
    {'train': 392_702, 'dev_matched': 9_815, 'dev_mismatched': 9_832},
  ),
  'qnli': Task(
    'QNLI',
    {'text': ('question',), 'pair': ('sentence',), 'label': ('label',)},
    _ENTAILED,
    {'train': 104_743, 'dev': 5_463},
  ),
  'rte': Task('RTE', _PAIR, _ENTAILED, {'train': 2_490, 'dev': 277}),
  'wnli': Task('WNLI', _PAIR, ('not_entailment', 'entailment'), {'train': 635, 'dev': 71}),
}
# Of several files of a split the first kind is read.
SUFFIXES = ('.tsv', '.csv', '.jsonl', '.json')
_OPTIONS = ('task', 'malformed', OPTION)


class Malformed(ValueError):
  """A line that is no row of its task."""


def glue(spec: str, labels: str = CLASSES) -> Dataset:
  """A task of GLUE in a folder.

  Args:
    spec: PATH?options, see above.
    labels: the kind that is wanted: 'numbers' of STS-B, 'classes' of the others.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: no task, one whose labels are of another kind, no files, or a malformed line.
  """
  root, task, options = _task(spec)
  wanted = CLASSES if task.classes else NUMBERS
  if labels != wanted:
    raise ValueError(f'{task.folder} of GLUE learns {wanted}: set config.task={TASK_OF[wanted]!r}')
  unlabelled = Unlabelled(options[OPTION], 'label', named=True)
  files, notes = _files(root, task)
  examples: list[Example] = []
  keys = {}
  for split, file in files.items():
    numbered, skipped = _numbered(file, task, options['malformed'] == 'skip')
    said = [label for _, _, label in numbered]

    def where(i: int, numbered=numbered, file=file) -> str:
      return f'line {numbered[i][0]} of {file}'

    kept = unlabelled.labelled(split, str(file), said, where)
    if not kept:
      continue
    found = [numbered[i][1] | {'label': said[i]} for i in kept]
    keys[split] = ['\t'.join(e[part] for part in ('text', 'pair') if part in e) for e in found]
    examples += found
    published = task.sizes.get(split, len(found))
    if skipped:
      notes.append(
        f'{file}: {len(skipped):,} malformed lines are left out, the first is line {skipped[0]}'
      )
    if len(found) != published:
      notes.append(f'{file} has {len(found):,} rows, and published ones are of {published:,}')
  if not examples:
    raise ValueError(f'there is nothing to learn: {"; ".join(unlabelled.left_out.values())}')

  def label_of(row: int) -> Any:
    return examples[row]['label']

  return Dataset(
    examples.__getitem__,
    split_rows(keys),
    list(task.classes) or ['score'],
    left_out=unlabelled.left_out,
    labels=wanted,
    label_of=label_of,
    notes=(*notes, *unlabelled.notes),
  )


def glue_input(spec: str, name: str) -> str:
  """PATH?options of a table as `data.asked` reads it, with the columns of a task of GLUE.

  Args:
    spec: of a .csv, .tsv or .jsonl file; its own options come first.
    name: of the data set, 'glue:...'.

  Raises:
    FileNotFoundError, ValueError: no such file, or one without the texts of the task.
  """
  path, _, own = spec.partition('?')
  file = Path(path).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f'there is no file {file}')
  _, task, _ = _task(name.partition(':')[2])
  rows, has_names = _rows(file, task)
  options = _columns(file, task, next(rows, (0, {}, ''))[1])
  options.pop('label', None)
  if not has_names:
    options = {part: str(task.fields.index(column)) for part, column in options.items()}
    options['header'] = 'no'
  if file.suffix == '.tsv':
    options['quote'] = ''
  options |= urllib.parse.parse_qsl(own, keep_blank_values=True)
  return f'{path}?{urllib.parse.urlencode(options)}'


# ---- Which task, which files.


def _task(spec: str) -> tuple[Path, Task, dict[str, str | None]]:
  """(the folder of its files, the task, options)."""
  default: dict[str, Any] = {'task': '', 'malformed': MALFORMED[0], OPTION: None}
  root, options = options_of(spec, 'glue', _OPTIONS, default)
  skips(spec, 'glue', options['malformed'])
  named = options['task'] or root.name
  task = TASKS.get(_plain(named))
  if task is None:
    advice = '' if options['task'] else '; name it by ?task='
    raise ValueError(
      f'glue:{spec}: no task of GLUE is called {named!r}{advice}; '
      f'{suggestion(_plain(named), TASKS)}'
    )
  if root.is_dir() and _plain(root.name) not in TASKS:
    for folder in sorted(root.iterdir()):
      if folder.is_dir() and _plain(folder.name) == _plain(named):
        return folder, task, options
  return root, task, options


def _plain(name: str) -> str:
  """A name of a task without what its spellings differ in: 'SST-2' is 'sst2'."""
  return ''.join(letter for letter in name.lower() if letter.isalnum())


def _files(root: Path, task: Task) -> tuple[dict[str, Path], list[str]]:
  """({split: its file}, sentences on those that are not read)."""
  if not root.is_dir():
    beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
    raise FileNotFoundError(f'there is no folder {root}; {suggestion(root.name, beside)}')
  found: dict[str, Path] = {}
  unread = []
  tests = {split.replace('dev', 'test') for split in task.sizes if split != 'train'}
  for suffix in SUFFIXES:
    for file in sorted(root.glob(f'*{suffix}')):
      split = file.stem.replace('validation', 'dev')
      if split in {*task.sizes, *tests} and split not in found:
        found[split] = file
      else:
        unread.append(file.name)
  if 'train' not in found:
    raise ValueError(
      f'there is no train.tsv in {root} (nor .csv, .jsonl or .json): {task.folder} of GLUE has '
      f'{", ".join(f"{split}.tsv" for split in task.sizes)}'
    )
  notes = []
  if unread:
    notes.append(f'{root}: not read are {", ".join(sorted(unread))}')
  return {split: found[split] for split in sorted(found)}, notes


# ---- Rows.

# Line in the file, values, and what is wrong with their number; '' for nothing.
_Read = tuple[int, Values, str]


def _rows(file: Path, task: Task) -> tuple[Iterator[_Read], bool]:
  """(rows of a file, whether it has the names of its columns)."""
  if file.suffix in ('.jsonl', '.json'):
    return ((line, values, '') for line, values in jsonl_rows(file)), True
  if file.suffix == '.csv':
    return _csv_rows(file, tuple(itertools.chain(*task.columns.values()))), True
  with textfiles.opened(file, newline='\n') as lines:
    first = _fields(next(lines, ''))
  has_names = not task.fields or any(name in first for name in task.columns['text'])
  return _tsv_rows(file, first if has_names else task.fields, has_names), has_names


def _csv_rows(file: Path, used: Sequence[str]) -> Iterator[_Read]:
  for line, values in csv_rows(file, ',', '"', True, used):
    short = None in values.values()
    yield line, values, 'has fewer fields than the first line' if short else ''


def _tsv_rows(file: Path, names: Sequence[str], has_names: bool) -> Iterator[_Read]:
  with textfiles.opened(file, newline='\n') as lines:
    for line, text in enumerate(lines, 1):
      if not text.strip() or (has_names and line == 1):
        continue
      fields = _fields(text)
      wrong = ''
      if len(fields) != len(names):
        wrong = f'has {len(fields)} fields between tabs, and its columns are {len(names)}'
      yield line, dict(itertools.zip_longest(names, fields[: len(names)])), wrong


def _fields(text: str) -> list[str]:
  return text.removesuffix('\n').removesuffix('\r').split('\t')


def _numbered(
  file: Path, task: Task, skip: bool
) -> tuple[list[tuple[int, Example, Any]], list[int]]:
  """([(line, {'text', ['pair']}, its label or None)] of a file, lines that are malformed)."""
  rows, _ = _rows(file, task)
  first = next(rows, None)
  if first is None:
    raise ValueError(f'{file} is empty: there is no row of data in it')
  columns = _columns(file, task, first[1])
  found = []
  skipped = []
  for line, values, wrong in itertools.chain([first], rows):
    try:
      if wrong:
        raise Malformed(wrong)
      found.append((line, _texts(columns, values), _label(task, columns.get('label'), values)))
    except Malformed as error:
      if not skip:
        raise ValueError(
          f'line {line} of {file} {error}; malformed=skip leaves such lines out'
        ) from None
      skipped.append(line)
  if not found:
    raise ValueError(f'{file} has no line that is a row of {task.folder}')
  return found, skipped


def _columns(file: Path, task: Task, values: Values) -> dict[str, str]:
  """{part of an example: its column}; without 'label' where a file has none.

  Raises:
    ValueError: texts that it does not have.
  """
  columns = {}
  for part, names in task.columns.items():
    there = [name for name in names if name in values]
    if there:
      columns[part] = there[0]
    elif part != 'label':
      raise ValueError(
        f'{file} has no column {names[0]!r}, as {task.folder} of GLUE has; '
        f'{suggestion(names[0], values)}'
      )
  return columns


def _texts(columns: dict[str, str], values: Values) -> Example:
  """{'text', ['pair']} of a row."""
  example = {}
  for part, column in columns.items():
    if part == 'label':
      continue
    if not isinstance(values.get(column), str):
      raise Malformed(f'has {values.get(column)!r} as its {column!r}; it must be a text')
    example[part] = values[column]
  return example


def _label(task: Task, column: str | None, values: Values) -> Any:
  """The number of a class, float32 [1] of a score, or None for a row that has none.

  A class is said by its name or its number.
  """
  if column is None:
    return None
  if column not in values:
    raise Malformed(f'has no {column!r}')
  said = values[column]
  if said is None or said in ('', '-1', '-1.0', -1):
    return None
  if not task.classes:
    try:
      return np.array([number(said)], np.float32)
    except ValueError:
      raise Malformed(f'has {said!r} as its {column!r}; it must be a number') from None
  for value, name in enumerate(task.classes):
    if str(said) in (name, str(value)):
      return value
  raise Malformed(
    f'has {said!r} as its {column!r}; it must be one of {", ".join(task.classes)}, or its number '
    'from 0 on'
  )
