"""confusion.json, what each class was taken for, and its tables in a report."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from jpeft import jsonfiles
from jpeft.messages import markdown
from jpeft.writing import write

FILE = 'confusion.json'
SQUARE = 12  # classes of which a page can show the whole matrix
LONGEST = 200  # classes that a page lists
_SCHEMA = {'step': int, 'labels': [str], 'confusion': [[int]]}


def write_confusion(
  folder: pathlib.Path, step: int, labels: Sequence[str], confusion: np.ndarray
) -> None:
  """Writes the counts of the last evaluation into a run folder.

  Args:
    folder: of the run.
    step: updates made.
    labels: names of the C classes.
    confusion: counts [C, C] by label (rows) and prediction (columns).
  """
  counts = np.asarray(confusion).astype(int).tolist()
  write(folder / FILE, json.dumps({'step': step, 'labels': list(labels), 'confusion': counts}))


def confusion_section(folder: pathlib.Path) -> list[str]:
  """Lines of Markdown on each class, of the last evaluation; none for a run without labels."""
  file = folder / FILE
  if not file.exists():
    return []
  told = jsonfiles.read(file, _SCHEMA)
  size = len(told['labels'])
  if [len(row) for row in told['confusion']] != [size] * size:
    raise ValueError(f'{file}: its confusion is no table of {size} x {size} counts')
  counts = np.array(told['confusion'], int).reshape(size, size)
  names = [name.replace('|', r'\|') for name in told['labels']]
  lines = ['', f'## Classes, at step {told["step"]}', '', _per_class(names, counts)]
  if len(names) > LONGEST:
    lines += ['', f'The first {LONGEST} of {len(names)}; {FILE} has all.']
  if len(names) <= SQUARE:
    head = ('label \\ prediction', *names)
    rows = [
      (name, *(f'{count:,}' for count in row)) for name, row in zip(names, counts, strict=True)
    ]
    lines += ['', markdown(head, rows)]
  return lines


def _per_class(names: Sequence[str], counts: np.ndarray) -> str:
  """The accuracy of each class, and what it is most often taken for."""
  rows = []
  for number, name in enumerate(names[:LONGEST]):
    examples = counts[number].sum()
    accuracy = '-'
    if examples:
      accuracy = f'{100 * counts[number, number] / examples:.1f} %'
    others = counts[number].copy()
    others[number] = 0
    mistake = '-'
    if others.any():
      mistake = f'{names[others.argmax()]} ({others.max():,})'
    rows.append((name, f'{examples:,}', accuracy, mistake))
  return markdown(('class', 'examples', 'accuracy', 'most often taken for'), rows)
