"""metrics.jsonl, the log of a run."""

import json
import pathlib
import time

from jpeft.lazy import extra

from .checkpoints import write


class Metrics:
  """metrics.jsonl: one JSON object a line, {'step', 'split', values..., 'time': {...}}.

  Times are under 'time' alone: the other keys of two equal runs are equal.

  Attributes:
    path: of the file.
    rows: its lines.
  """

  def __init__(self, path: pathlib.Path, step: int, tensorboard: bool = False):
    """Opens the log of a run that goes on from `step`.

    Later lines are removed, because the run writes them again.
    """
    self.path = path
    self.rows = [row for row in read_metrics(path) if row['step'] <= step]
    write(path, ''.join(json.dumps(row) + '\n' for row in self.rows))
    self._start = time.perf_counter()
    self._writer = None
    if tensorboard:
      self._writer = _event_writer()(str(path.parent / 'tensorboard'), purge_step=step + 1)

  @staticmethod
  def check(tensorboard: bool) -> None:
    """Raises an ImportError if event files are wanted and tensorboardX is not installed."""
    if tensorboard:
      _event_writer()

  def add(self, step: int, split: str, **values: float) -> None:
    """Writes a line."""
    row = {'step': step, 'split': split, **values}
    row['time'] = {
      'at': round(time.time(), 3),
      'seconds': round(time.perf_counter() - self._start, 3),
    }
    self.rows.append(row)
    with self.path.open('a') as file:
      file.write(json.dumps(row) + '\n')
    if self._writer:
      for name, value in values.items():
        self._writer.add_scalar(f'{split}/{name}', value, step)

  def has(self, step: int, split: str) -> bool:
    """Whether there is a line of a step and split."""
    return any(row['step'] == step for row in self.of(split))

  def of(self, split: str) -> list[dict]:
    """The lines of a split."""
    return [row for row in self.rows if row['split'] == split]

  def close(self) -> None:
    """Ends the writer of TensorBoard files."""
    if self._writer:
      self._writer.close()


def _event_writer():
  """The class that writes the event files of TensorBoard."""
  with extra('tensorboard'):
    from tensorboardX import SummaryWriter
  return SummaryWriter


def read_metrics(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
  if not path.exists():
    return []
  whole = path.read_text().rpartition('\n')[0]
  return [json.loads(line) for line in whole.splitlines()]


def values(row: dict) -> dict[str, float]:
  """The measured values of a line of metrics.jsonl."""
  return {name: value for name, value in row.items() if name not in ('step', 'split', 'time')}
