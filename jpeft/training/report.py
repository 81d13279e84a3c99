"""report.json, report.md, and runs side by side as a table."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from jpeft import jsonfiles
from jpeft.messages import markdown
from jpeft.programs import mib
from jpeft.writing import write

from . import elastic, hosts
from .by_label import by_label_section
from .checkpoints import is_theta, steps_of
from .confusion import confusion_section
from .curves import draw_curves
from .examples import listed
from .metrics import read_metrics

# The metrics that a table has a column for.
SHOWN = (
  *('accuracy', 'mean_average_precision', 'micro_f1', 'subset_accuracy', 'rmse', 'r2'),
  *('f1', 'perplexity', 'exact_match', 'word_error_rate', 'phoneme_error_rate'),
)
# Those of them that are no share of something.
_NO_SHARES = ('rmse', 'r2', 'loss')
# Of report.json: what `table` reads, and what its pages are made of beside that.
_TABLE = {
  'method': str,
  'eval': dict,
  'untuned?': dict,
  'trainable': int,
  'total': int,
  'step_cost': {str: float},
  'seconds': float,
}
_PAGES = {
  'data': str,
  'memory': str,
  'mergeable': bool,
  'best': {'step': int, 'metric': str, 'value': object},  # which may be infinite
  'storage': (str, None),
  'backbone_bytes': float,
  'steps': int,
  'batch_size': int,
  'step_cost': {'compile_seconds': float},
  'device': str,
  'backbone_sha256': str,
  'theta_sha256': str,
  'skipped?': {str: {'examples': int, 'split': str, 'why': dict}},
  'damaged_checkpoints?': [str],
  'narrow?': str,
  'changes?': [elastic.CHANGE],
}


def line(what, scores: dict[str, float]) -> str:
  """Scores on one line."""
  return f'{what}: {_listed(scores)}'


def _listed(scores: dict[str, float]) -> str:
  return ', '.join(f'{name} {value:.4f}' for name, value in scores.items())


def begun(config, facts, steps: int, start: int) -> str:
  """What a run trains, on one line.

  Args:
    config: complete.
    facts: `summary` of its method.
    steps: updates in all.
    start: those that were made before.
  """
  told = (
    f'{config.method.name} on {config.model.source}, {config.data.name}: {facts.trainable:,} '
    f'trainable numbers beside {facts.total:,}, {facts.memory}; {steps} updates of '
    f'{config.data.batch_size}'
  )
  if start:
    told += f', going on after {start}'
  if hosts.several():
    told += f'; {hosts.count()} processes'
  return told


def needs(cost: dict[str, float]) -> str:
  """What an update needs of a device, in a line.

  Args:
    cost: from `fitting`.
  """
  parts = []
  if 'total_bytes' in cost:
    weights = mib(cost['weights_bytes'])
    state = mib(cost['state_bytes'])
    temporary = mib(cost['temp_bytes'])
    parts.append(
      f'{mib(cost["total_bytes"])} (weights {weights}, trained with its optimizer {state}, '
      f'temporary {temporary})'
    )
  if 'flops' in cost:
    parts.append(f'{cost["flops"] / 1e9:,.1f} GFLOP')
  asked = ', '.join(parts) or 'what its backend does not say'
  return f'an update asks for {asked}; compiled in {cost["compile_seconds"]:.1f} s'


# ---- Files.


def write_report(folder: pathlib.Path, report: dict[str, Any], rows: list[dict]) -> str | None:
  """Writes report.md, curves.png if matplotlib is installed, and report.json.

  That comes last: where it is, the run is complete.

  Args:
    folder: of the run.
    report: what report.json gets.
    rows: the lines of metrics.jsonl.

  Returns:
    Why there is no curves.png; None if there is one.
  """
  name = f'{report["method"]} on {report["data"]}'
  missing = None
  try:
    draw_curves(folder / 'curves.png', rows, _title(name, report), _drawn(report))
  except ModuleNotFoundError as error:
    missing = f'curves.png is left out: {error}'
  lines = [f'# {name}', '', table([report]), '']
  lines += [f'- {name}: {value}' for name, value in _facts(report).items()]
  lines += confusion_section(folder)
  lines += by_label_section(folder)
  lines += ['', missing or '![curves](curves.png)']
  write(folder / 'report.md', '\n'.join([*lines, '']))
  write(folder / 'report.json', json.dumps(report, indent=2) + '\n')
  return missing


def finished(folder: pathlib.Path, tell: Callable[[str], None]) -> dict[str, Any] | None:
  """report.json of a run that is complete; None of one that has to go on.

  What is missing beside it is made again: pages from the log, theta from the last checkpoint, with
  which the run then has to go on.

  Args:
    folder: of the run.
    tell: called with a sentence on what is missing.

  Raises:
    ValueError: report.json cannot be read, or theta is missing and there is no checkpoint.
  """
  file = folder / 'report.json'
  if not file.exists():
    return None
  pages = [name for name in ('report.md', 'curves.png') if not (folder / name).exists()]
  try:
    report = jsonfiles.read(file, _TABLE)
    if pages:
      jsonfiles.check(report, _PAGES, str(file))
  except ValueError as error:
    raise ValueError(f'{file} is damaged ({error}): delete it, and the run goes on') from error
  theta, best = folder / 'theta.safetensors', folder / 'best.safetensors'
  if not is_theta(theta):
    if not steps_of(folder / 'checkpoints'):
      raise ValueError(
        f'{folder} is complete, but {theta.name} is missing or damaged, and there is no checkpoint '
        'to make it from; delete report.json to train again'
      )
    tell(f'{theta} is missing or damaged: it is made again from the last checkpoint')
    return None
  if not is_theta(best):
    tell(f'warning: {best} is missing or damaged, and cannot be made again')
  if pages:
    missing = write_report(folder, report, read_metrics(folder / 'metrics.jsonl'))
    made = [name for name in pages if (folder / name).exists()]
    tell(missing or f'{", ".join(made)} of {folder} was missing, and is made again')
  return report


def _title(name: str, report: dict[str, Any]) -> str:
  """The title of the curves."""
  metric = _drawn(report)
  at_end = report['eval'][metric]
  told = _number(metric, at_end) if metric in SHOWN else f'{at_end:.4f}'
  return f'{name}: {metric.replace("_", " ")} {told} at the end, {report["memory"]}'


def _drawn(report: dict[str, Any]) -> str:
  """The metric that is drawn beside the loss; 'loss' of a task that has no other."""
  metric = report['best']['metric']
  if metric != 'loss':
    return metric
  return next((name for name in SHOWN if name in report['eval']), metric)


def _facts(report: dict[str, Any]) -> dict[str, str]:
  """{name: value} of the list in report.md."""
  cost = report['step_cost']
  best = report['best']
  stored = f'{report["backbone_bytes"] / 2**20:,.1f} MiB'
  if report['storage']:
    stored += f', kernels as {report["storage"]}'
  unit = 'rows' if 'untuned' in report else 'examples'
  flops = 'not known'
  if 'flops' in cost:
    flops = f'{cost["flops"] / 1e9:.2f} G, as XLA counts'
  facts = {
    'trainable numbers': f'{report["trainable"]:,} of {report["total"]:,} in the backbone',
    'backbone as stored': stored,
    'memory class': report['memory'],
    'mergeable': 'yes' if report['mergeable'] else 'no',
    'updates': f'{report["steps"]:,} of {report["batch_size"]} {unit}',
    'seconds': f'{report["seconds"]:.1f} of training, {cost["compile_seconds"]:.1f} of compilation',
    'best': f'{best["metric"]} {best["value"]:.4f} at step {best["step"]}',
    'FLOPs of an update': flops,
    'device': report['device'],
    'backbone': f'SHA-256 {report["backbone_sha256"]}, unchanged',
    'theta': f'SHA-256 {report["theta_sha256"]}',
  }
  if 'narrow' in report:
    facts['a narrow model'] = report['narrow']
  if 'skipped' in report:
    facts['examples that could not be read, and were skipped'] = listed(report['skipped'])
  if 'damaged_checkpoints' in report:
    facts['checkpoints that could not be read'] = ', '.join(report['damaged_checkpoints'])
  # XLA's buffers on a CPU say nothing of an accelerator's.
  if 'temp_bytes' in cost and 'cpu' not in report['device']:
    facts['temporary bytes'] = f'{cost["temp_bytes"] / 2**20:.1f} MiB'
  for change in report.get('changes', ()):
    name, _, told = elastic.line(change).partition(': ')
    facts[name] = told
  if 'untuned' in report:
    facts['untuned'] = _listed(report['untuned'])
    facts['at the end'] = _listed(report['eval'])
  return facts


# ---- The table.


def table(reports: list[dict]) -> str:
  """Runs side by side, as a Markdown table."""
  shown = [name for name in SHOWN if name in reports[0]['eval']] or ['loss']
  if 'perplexity' in shown:
    shown.remove('accuracy')  # of single tokens
  names = [name.replace('_', ' ') for name in shown]
  head = ('method', *names, 'trainable', 'of backbone', 'GFLOP a step', 'seconds')
  return markdown(head, [_row(report, shown) for report in reports])


def _row(report: dict, shown: list[str]) -> tuple[str, ...]:
  flops = '-'
  if report['step_cost'].get('flops'):
    flops = f'{report["step_cost"]["flops"] / 1e9:.1f}'
  return (
    report['method'],
    *(_score(report, name) for name in shown),
    f'{report["trainable"]:,}',
    f'{100 * report["trainable"] / report["total"]:.2f} %',
    flops,
    f'{report["seconds"]:.0f}',
  )


def _score(report: dict, name: str) -> str:
  """A metric at the end of training, after that of the untuned model if it was measured."""
  new = _number(name, report['eval'].get(name, math.nan))
  old = report.get('untuned', {}).get(name)
  if old is None:
    return new
  return f'{_number(name, old)} -> {new}'


def _number(name: str, value: float) -> str:
  if name == 'perplexity':
    return f'{value:,.1f}'
  if name in _NO_SHARES:
    return f'{value:.4g}'
  return f'{100 * value:.1f} %'
