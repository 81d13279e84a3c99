"""What a run tells: a line while it works, metrics.jsonl, report.json, report.md and curves.png."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jpeft.programs import mib

from .checkpoints import write

_SHOWN = (
  'accuracy',
  'perplexity',
  'exact_match',
  'word_error_rate',
  'phoneme_error_rate',
)  # in tables


class Progress:
  """One line that is rewritten on a terminal; elsewhere a plain line every `every` seconds."""

  def __init__(self, steps: int, done: int, out=None, every: float = 10.0):
    self.steps, self.first, self.every = steps, done, every
    self.out = out or sys.stderr
    self.live = self.out.isatty()
    self.start = self.last = time.perf_counter()
    self.width = 0

  def show(self, step: int, force: bool = False, **values: float) -> None:
    now = time.perf_counter()
    if not force and now - self.last < (0.1 if self.live else self.every):
      return
    self.last = now
    rate = (step - self.first) / max(now - self.start, 1e-9)
    left = (self.steps - step) / rate if rate else float('inf')
    shown = ''.join(
      f'  {name} {value:.4g}' for name, value in values.items() if not math.isnan(value)
    )
    self._put(f'step {step}/{self.steps}{shown}  {rate:.2f} steps/s  {clock(left)} left')

  def note(self, text: str) -> None:
    """A line that stays."""
    if self.live and self.width:
      self.out.write('\r' + ' ' * self.width + '\r')
    self.width = 0
    self.out.write(text + '\n')
    self.out.flush()

  def _put(self, text: str) -> None:
    if not self.live:
      return self.note(text)
    self.out.write('\r' + text.ljust(self.width))
    self.width = len(text)
    self.out.flush()


def clock(seconds: float) -> str:
  """3:07 or 1:02:33."""
  if seconds == float('inf'):
    return '?'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


class Metrics:
  """metrics.jsonl: one JSON object a line, {'step', 'split', values..., 'time': {...}}.

  What a clock says stands under 'time' alone: the other keys of two equal runs are equal.
  """

  def __init__(self, path: pathlib.Path, step: int, tensorboard: bool = False):
    """Opens the log of a run that goes on from `step`: later lines are made again, so they go."""
    self.path = path
    self.rows = [row for row in read_metrics(path) if row['step'] <= step]
    write(path, ''.join(json.dumps(row) + '\n' for row in self.rows))
    self._start, self._writer = time.perf_counter(), None
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._writer = SummaryWriter(str(path.parent / 'tensorboard'), purge_step=step + 1)

  def add(self, step: int, split: str, **values: float) -> None:
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
    return any(row['step'] == step for row in self.of(split))

  def of(self, split: str) -> list[dict]:
    return [row for row in self.rows if row['split'] == split]

  def close(self) -> None:
    if self._writer:
      self._writer.close()


def line(what, scores: dict[str, float]) -> str:
  """Scores on one line."""
  return f'{what}: ' + ', '.join(f'{name} {value:.4f}' for name, value in scores.items())


def values(row: dict) -> dict[str, float]:
  """What was measured, of a line of metrics.jsonl."""
  return {name: value for name, value in row.items() if name not in ('step', 'split', 'time')}


def read_metrics(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
  if not path.exists():
    return []
  whole = path.read_text().rpartition('\n')[0]
  return [json.loads(line) for line in whole.splitlines()]


def write_report(folder: pathlib.Path, report: dict[str, Any], rows: list[dict]) -> None:
  """Writes report.json, report.md and, where matplotlib is installed, curves.png."""
  write(folder / 'report.json', json.dumps(report, indent=2) + '\n')
  drawn = _curves(folder / 'curves.png', rows)
  lines = [f'# {report["method"]} on {report["data"]}', '', table([report]), '']
  cost = report['step_cost']
  facts = {
    'trainable numbers': f'{report["trainable"]:,} of {report["total"]:,} in the backbone',
    'backbone as stored': f'{report["backbone_bytes"] / 2**20:,.1f} MiB'
    + (f', kernels as {report["storage"]}' if report['storage'] else ''),
    'memory class': report['memory'],
    'mergeable': 'yes' if report['mergeable'] else 'no',
    'updates': f'{report["steps"]:,} of {report["batch_size"]} {"rows" if "untuned" in report else "examples"}',
    'seconds': f'{report["seconds"]:.1f} of training, {cost["compile_seconds"]:.1f} of compilation',
    'best': f'{report["best"]["metric"]} {report["best"]["value"]:.4f} at step {report["best"]["step"]}',
    'FLOPs of an update': f'{cost["flops"] / 1e9:.2f} G, as XLA counts'
    if 'flops' in cost
    else 'not known',
    'device': report['device'],
    'backbone': f'SHA-256 {report["backbone_sha256"]}, unchanged',
    'theta': f'SHA-256 {report["theta_sha256"]}',
  }
  if (
    'temp_bytes' in cost and 'cpu' not in report['device']
  ):  # XLA's CPU buffers say nothing of an accelerator's
    facts['temporary bytes'] = f'{cost["temp_bytes"] / 2**20:.1f} MiB'
  facts |= {
    what: line(what, report[key]).partition(': ')[2]
    for what, key in (('untuned', 'untuned'), ('at the end', 'eval'))
    if 'untuned' in report
  }
  lines += [f'- {name}: {value}' for name, value in facts.items()]
  write(
    folder / 'report.md', '\n'.join([*lines, *(['', '![curves](curves.png)'] if drawn else []), ''])
  )


def table(reports: list[dict]) -> str:
  """Runs side by side, as a Markdown table."""
  shown = [name for name in _SHOWN if name in reports[0]['eval']]
  if 'perplexity' in shown:
    shown.remove('accuracy')  # of single tokens

  def score(r, name):
    new, old = r['eval'].get(name, math.nan), r.get('untuned', {}).get(name)
    number = lambda x: f'{x:,.1f}' if name == 'perplexity' else f'{100 * x:.1f} %'
    return number(new) if old is None else f'{number(old)} -> {number(new)}'

  def row(r):
    flops = r['step_cost'].get('flops')
    return (
      r['method'],
      *(score(r, name) for name in shown),
      f'{r["trainable"]:,}',
      f'{100 * r["trainable"] / r["total"]:.2f} %',
      f'{flops / 1e9:.1f}' if flops else '-',
      f'{r["seconds"]:.0f}',
    )

  names = [name.replace('_', ' ') for name in shown]
  return markdown(
    ('method', *names, 'trainable', 'of backbone', 'GFLOP a step', 'seconds'), map(row, reports)
  )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table."""
  rows = [head, *rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  rows.insert(1, tuple('-' * w for w in widths))
  padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
  return '\n'.join(f'| {" | ".join(row)} |' for row in padded)


def asks(cost: dict[str, float]) -> str:
  """What an update asks of a device, in a line, from `step.fitting`."""
  parts = [f'{cost["flops"] / 1e9:,.1f} GFLOP'] if 'flops' in cost else []
  if 'total_bytes' in cost:
    names = {'weights': 'weights', 'state': 'trained with its optimizer', 'temp': 'temporary'}
    sizes = ', '.join(f'{name} {mib(cost[f"{part}_bytes"])}' for part, name in names.items())
    parts.insert(0, f'{mib(cost["total_bytes"])} ({sizes})')
  return f'an update asks for {", ".join(parts) or "what its backend does not say"}'


def _curves(path: pathlib.Path, rows: list[dict]) -> bool:
  """Draws loss and accuracy; False where matplotlib is not installed."""
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError:
    return False
  figure = Figure(figsize=(9, 3.2), layout='constrained')
  FigureCanvasAgg(figure)
  for axis, name in zip(figure.subplots(1, 2), ('loss', 'accuracy'), strict=True):
    for split, style in (('train', '-'), ('test', 'o-')):
      points = [(r['step'], r[name]) for r in rows if r['split'] == split]
      if points:
        axis.plot(*zip(*points, strict=True), style, label=split, markersize=4)
    axis.set(xlabel='update', ylabel=name)
    axis.grid(alpha=0.3)
    axis.legend()
  figure.savefig(path, dpi=110)
  return True
