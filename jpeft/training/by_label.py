"""labels.json, the scores of each label, and their table in a report."""

import json
import pathlib
from collections.abc import Mapping

from jpeft import jsonfiles
from jpeft.messages import markdown
from jpeft.writing import write

FILE = 'labels.json'
LONGEST = 200  # labels that a page lists


def write_by_label(
  folder: pathlib.Path, step: int, scores: Mapping[str, Mapping[str, float]]
) -> None:
  """Writes the scores of the last evaluation into a run folder.

  Args:
    folder: of the run.
    step: updates made.
    scores: {label: {score: value}}, the same scores of each label.
  """
  write(folder / FILE, json.dumps({'step': step, 'labels': scores}))


def by_label_section(folder: pathlib.Path) -> list[str]:
  """Lines of Markdown on each label, of the last evaluation; none for a run without such scores."""
  file = folder / FILE
  if not file.exists():
    return []
  told = jsonfiles.read(file, {'step': int, 'labels': {str: {str: object}}})
  names = list(next(iter(told['labels'].values()), ()))
  for label, scores in told['labels'].items():
    numbers = all(isinstance(score, (int, float)) for score in scores.values())
    if scores.keys() != set(names) or not numbers:
      raise ValueError(f'{file}: the scores of {label!r:.60} are not numbers by the same names')
  rows = []
  for label, scores in list(told['labels'].items())[:LONGEST]:
    values = (
      f'{scores[name]:,}' if name == 'examples' else f'{scores[name]:.4g}' for name in names
    )
    rows.append((label.replace('|', r'\|'), *values))
  head = ('label', *(name.replace('_', ' ') for name in names))
  lines = ['', f'## Labels, at step {told["step"]}', '', markdown(head, rows)]
  if len(told['labels']) > LONGEST:
    lines += ['', f'The first {LONGEST} of {len(told["labels"])}; {FILE} has all.']
  return lines
