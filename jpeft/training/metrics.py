"""metrics.jsonl, the log of a run."""

import json
import pathlib
import time

from jpeft import jsonfiles, textfiles
from jpeft.writing import append, write

from .writers import Writers


class Metrics:
  """metrics.jsonl: one JSON object a line, {'step', 'split', values..., 'time': {...}}.

  Times are under 'time' alone: the other keys of two equal runs are equal.

  Attributes:
    path: of the file.
    rows: its lines.
  """

  def __init__(self, path: pathlib.Path, step: int):
    """Opens the log of a run that goes on from `step`.

    Later lines are removed, because the run writes them again.
    """
    self.path = path
    self.rows = [row for row in read_metrics(path) if row['step'] <= step]
    write(path, ''.join(json.dumps(row) + '\n' for row in self.rows))
    self._start = time.perf_counter()
    self._trackers: Writers | None = None

  def copied_to(self, trackers: Writers) -> None:
    """Gives later lines to the trackers as well."""
    self._trackers = trackers

  def add(self, step: int, split: str, **values: float) -> None:
    """Writes a line."""
    row = {'step': step, 'split': split, **values}
    row['time'] = {
      'at': round(time.time(), 3),
      'seconds': round(time.perf_counter() - self._start, 3),
    }
    self.rows.append(row)
    append(self.path, json.dumps(row) + '\n')
    if self._trackers:
      self._trackers.scalars(step, split, values)

  def has(self, step: int, split: str) -> bool:
    """Whether there is a line of a step and split."""
    return any(row['step'] == step for row in self.of(split))

  def of(self, split: str) -> list[dict]:
    """The lines of a split."""
    return [row for row in self.rows if row['split'] == split]


def read_metrics(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics.jsonl; a last line that a kill cut short is left out.

  Raises:
    ValueError: another line is damaged.
  """
  if not path.exists():
    return []
  textfiles.check_regular(path)
  rows = []
  whole = path.read_bytes().rpartition(b'\n')[0]
  for number, line in enumerate(whole.splitlines(), 1):
    try:
      row = jsonfiles.parsed(line, 'it')
      jsonfiles.check(row, {'step': int, 'split': str}, 'it')
    except ValueError as error:
      raise ValueError(
        f'line {number} of {path} is damaged ({error}): delete that line, and the run goes on'
      ) from error
    rows.append(row)
  return rows


def values(row: dict) -> dict[str, float]:
  """The measured values of a line of metrics.jsonl."""
  return {name: value for name, value in row.items() if name not in ('step', 'split', 'time')}
