r"""Methods x tasks x seeds: how well each method does what the others do.

    python -m jpeft.bench.accuracy --tasks=quickstart,sentiment,emoji \
        --methods=linear,lst,lora --seeds=0,1,2
    python -m jpeft.bench.accuracy --json

A task is a config that comes with jpeft, or a file of the folder --configs, and a method an
argument of it, so a cell of the table is the run that `python -m jpeft.train --config=TASK:METHOD
--config.seed=SEED` makes. Runs are kept below --out (runs/accuracy): those that are complete are
not trained again, and one that was stopped goes on, so the same command may be given until the
table is whole.

The result of a run replaces that of the same task, method and seed in docs/accuracy.json, from
which docs/accuracy.md and a plot of accuracy against memory are drawn, so that the table can be
made in parts. Results of a method under settings that its config no longer has are removed. With
--json the rows of the runs asked for go to stdout and no document is written. --only-table trains
nothing and uses the runs that are complete.

Step times are those of docs/speed/TASK.json, which is what
`python -m jpeft.bench.speed --config=configs/TASK.py --methods=full,... --json` prints.
"""

import functools
import itertools
import json
import math
import pathlib
import statistics
import sys
from typing import Any

from jpeft import cli, planning, training
from jpeft import config as config_lib
from jpeft.lazy import extra
from jpeft.messages import markdown
from jpeft.writing import appearing, write

from . import memory, records
from .pictures import compared

TASKS = {
  'quickstart': (
    'DINOv2-S/14-architecture weights on 1,000 MNIST digits at 56 pixels, 1,000 others to test'
  ),
  'sentiment': 'MiniLM-L6 on 7,030 sentences of movie reviews, 3,042 others to test',
  'emoji': (
    'DINOv2-S/14-architecture weights on 1,324 emoji of 9 Unicode groups at 112 pixels, 582 others '
    'to test'
  ),
}
METHODS = ('linear', 'lst', 'bitfit', 'ssf', 'lora', 'adaptformer', 'vpt_deep', 'full')
KEY = ('task', 'method', 'seed')
SETTINGS = ('settings', 'weight_decay')
COLUMNS = (
  'method',
  'accuracy',
  'seeds',
  'trainable',
  'of backbone',
  'updates',
  'GFLOP',
  'time',
  'W1 MiB',
  'recomputed',
  'memory class',
)
INTRODUCTION = (
  '# Accuracy\n\n'
  'Accuracy on the test split at the end of training, mean and standard error over seeds; the test '
  'split is the same for all. GFLOP are of one update, as compiled: where no backbone backprop '
  'happens, features of the backbone are made once an example and kept. Time is that of an update '
  'that runs the backbone, as a ratio to full fine-tuning in one process on two CPU cores. W1 is '
  "the training step of [memory.md](memory.md), there with the method's defaults, scanned or "
  'unrolled, whichever takes less memory; recomputed is the same with blocks recomputed in the '
  'backward pass (`remat`), where it was measured and takes less. The picture has the lesser '
  'of the two, and for each memory class a line through what no other method of the class beats in '
  'both accuracy and memory.\n\n'
  'Made by `python -m jpeft.bench.accuracy`, in parts; [accuracy.json](accuracy.json) has each run '
  'with its settings.'
)
# The defaults; None of flags that take no value.
FLAGS = {
  'tasks': ','.join(TASKS),
  'methods': ','.join(METHODS),
  'seeds': '0,1,2',
  'configs': '',
  'out': 'runs/accuracy',
  'docs': 'docs/accuracy.md',
  'json': None,
  'only-table': None,
}


def main(argv: list[str]) -> int:
  if cli.asks_help(argv):
    print(cli.described(__doc__))
    return 0
  with cli.inputs_checked():
    flags = parse(argv)
    if 'json' not in flags:
      with extra('quickstart'):
        import matplotlib  # noqa: F401  (said before the first run)
    configs = _configs(flags)
    # All mistakes before the first run is trained.
    for config in configs.values():
      training.method_of(config)
  file = pathlib.Path(flags['docs'])
  file.parent.mkdir(parents=True, exist_ok=True)
  cells = []
  for (task, method, seed), config in configs.items():
    folder = pathlib.Path(flags['out']) / task / f'{method}-{seed}'
    report = _report(config, folder, train='only-table' not in flags)
    if report is None:
      continue
    cells.append(cell(task, method, config, report))
    if 'json' not in flags and 'only-table' not in flags:
      publish(file, cells[-1:])  # after each run: a table in part, should the rest be interrupted
  if 'json' in flags:
    print(json.dumps(rows(cells), indent=2))
  else:
    print(publish(file, cells))
  return 0


def _configs(flags: dict[str, str | None]) -> dict[tuple[str, str, str], Any]:
  """{(task, method, seed): configuration}, seed by seed: whole tables of fewer seeds first."""
  seeds = flags['seeds'].split(',')
  tasks = flags['tasks'].split(',')
  methods = flags['methods'].split(',')
  configs = {}
  for seed, task, method in itertools.product(seeds, tasks, methods):
    overrides = {'seed': seed, 'baseline': 'none'}
    file = task
    if flags['configs']:
      file = pathlib.Path(flags['configs']) / f'{task}.py'
    configs[task, method, seed] = config_lib.load(f'{file}:{method}', overrides)
  return configs


def _report(config, folder: pathlib.Path, train: bool) -> dict | None:
  """The report of a run, which is trained if it must and may; None if there is none."""
  if train:
    with training.resumable(folder):
      return training.train(config, folder)
  file = folder / 'report.json'
  if not file.exists():
    return None
  return json.loads(file.read_text())


def parse(argv: list[str]) -> dict[str, str | None]:
  """{flag: value} over the defaults; --json and --only-table, which take none, only if given.

  Raises:
    ValueError: an unknown flag, a flag without a value, or a seed that is no number.
  """
  flags = {name: value for name, value in FLAGS.items() if value is not None}
  for argument in argv:
    name, equals, value = argument.removeprefix('--').partition('=')
    if not argument.startswith('--') or name not in FLAGS:
      raise ValueError(f'unknown argument {argument!r}{config_lib.nearest(name, FLAGS)}')
    takes_value = FLAGS[name] is not None
    if equals and not takes_value:
      raise ValueError(f'--{name} takes no value')
    if takes_value and not equals:
      raise ValueError(f'--{name} needs a value: --{name}=VALUE')
    flags[name] = value
  if not all(seed.isdigit() for seed in flags['seeds'].split(',')):
    raise ValueError(f'--seeds={flags["seeds"]} is not a list of numbers such as 0,1,2')
  return flags


def cell(task: str, method: str, config, report: dict) -> dict:
  """What docs/accuracy.json has of a run, from its config and its report.json."""
  return {
    'task': task,
    'method': method,
    'seed': config.seed,
    'accuracy': report['eval']['accuracy'],
    'trainable': report['trainable'],
    'total': report['total'],
    'memory': report['memory'],
    'steps': report['steps'],
    'step_gflop': report['step_cost']['flops'] / 1e9,
    'settings': settings(config),
    'weight_decay': config.optimizer.weight_decay,
  }


def settings(config) -> str:
  """What a config sets for each method: hyperparameters, learning rate, length of training."""
  given = {
    **config.method,
    'lr': config.optimizer.lr,
    'epochs': config.epochs,
    'steps': config.steps,
  }
  if given.get('start') is None:  # nothing to take a head from
    given.pop('start_head', None)
  return ', '.join(f'{key}={value}' for key, value in given.items() if value is not None)


def rows(cells: list[dict]) -> list[dict]:
  """Runs averaged over seeds, task by task, the most accurate first."""
  groups: dict[tuple, list[dict]] = {}
  for run in cells:
    groups.setdefault((run['task'], run['method']), []).append(run)
  order = {task: i for i, task in enumerate(TASKS)}

  def position(row):
    return order.get(row['task'], len(order)), -row['accuracy']

  return sorted(map(averaged, groups.values()), key=position)


def averaged(cells: list[dict]) -> dict:
  """The row of a method: the mean accuracy of its runs, and its standard error over seeds."""
  row = {key: value for key, value in cells[0].items() if key != 'seed'}
  accuracies = [run['accuracy'] for run in cells]
  row['accuracy'] = statistics.mean(accuracies)
  row['standard_error'] = None
  if len(cells) > 1:
    row['standard_error'] = statistics.stdev(accuracies) / math.sqrt(len(cells))
  row['seeds'] = len(cells)
  row['accuracies'] = accuracies
  row['w1_mib'] = w1_mib(row['method'])
  row['w1_recomputed_mib'] = None
  again = w1_mib(row['method'], ('block', 'dots'))
  if again is not None and (row['w1_mib'] is None or again < row['w1_mib']):
    row['w1_recomputed_mib'] = again
  return row


def publish(file: pathlib.Path, cells: list[dict]) -> str:
  """Records runs beside `file`, a Markdown page, and draws it again; returns its text."""
  kept = file.with_suffix('.json')
  stale = _stale(records.recorded(kept), cells)
  for run in stale:
    print(
      f'{run["task"]} {run["method"]}, seed {run["seed"]}, leaves the table: it was trained with '
      f'{run["settings"]}',
      file=sys.stderr,
    )
  found = rows(records.record(kept, cells, KEY, drop=stale))
  _add_times(found, file.parent / 'speed')
  plot = file.with_suffix('.png')
  draw(found, plot)
  text = page(found, plot.name)
  write(file, text)
  return text


def _stale(recorded: list[dict], cells: list[dict]) -> list[dict]:
  """The recorded runs whose method has other settings in new runs of the task."""
  now = {(run['task'], run['method']): run for run in cells}
  stale = []
  for run in recorded:
    new = now.get((run['task'], run['method']), run)
    # Rows that were recorded before weight decay was do not have it.
    if any(run.get(key, new[key]) != new[key] for key in SETTINGS if key in new):
      stale.append(run)
  return stale


def _add_times(found: list[dict], folder: pathlib.Path) -> None:
  """Sets the 'time' of rows: the ratio in TASK.json of a folder; None where nobody measured it."""
  ratios = {}
  for task in {row['task'] for row in found}:
    for timed in records.recorded(folder / f'{task}.json'):
      ratios.setdefault((task, timed['method']), timed['ratio'])
  for row in found:
    row['time'] = ratios.get((row['task'], row['method']))


@functools.cache
def w1_mib(method: str, remats: tuple[str, ...] = ('none',)) -> float | None:
  """The least total that docs/memory.json has of a method on W1 with such remat, if any."""
  found = []
  for row in memory.recorded():
    if (row['work'], row['method']) == ('w1', method) and row['remat'] in remats:
      found.append(row['total_mib'])
  return min(found, default=None)


def page(found: list[dict], plot: str) -> str:
  """The rows as a Markdown page, a table for each task, and the name of the plot."""
  parts = [INTRODUCTION, f'![accuracy against memory]({plot})']
  for task in dict.fromkeys(row['task'] for row in found):
    cells = [_cells(row) for row in found if row['task'] == task]
    parts += [f'## {task}', f'{TASKS.get(task, task)}.', markdown(COLUMNS, cells)]
  return '\n\n'.join(parts) + '\n'


def _cells(row: dict) -> tuple[str, ...]:
  """The texts of a row, in the order of COLUMNS."""
  return (
    row['method'],
    percent(row),
    str(row['seeds']),
    f'{row["trainable"]:,}',
    f'{100 * row["trainable"] / row["total"]:.2f} %',
    f'{row["steps"]:,}',
    f'{row["step_gflop"]:.3g}',
    shown(row['time'], '.2f'),
    shown(row['w1_mib'], ',.0f'),
    shown(row['w1_recomputed_mib'], ',.0f'),
    row['memory'],
  )


def shown(value: float | None, form: str) -> str:
  """A formatted number, or '-' for None."""
  if value is None:
    return '-'
  return format(value, form)


def percent(row: dict) -> str:
  """The accuracy of a row with its standard error, if there is one."""
  text = f'{100 * row["accuracy"]:.1f}'
  if row['standard_error'] is not None:
    text += f' ± {100 * row["standard_error"]:.1f}'
  return f'{text} %'


def draw(found: list[dict], path: pathlib.Path) -> None:
  """Plots accuracy against the memory of W1, a panel a task, the first one wide."""
  panels: dict[str, list[dict]] = {}
  for row in found:
    if _least(row) is not None:
      panels.setdefault(row['task'], []).append(row)
  if not panels:
    panels = {'none of these methods has a row of W1': []}
  panels = {task: compared(rows) for task, rows in panels.items()}
  mosaic = [[task] for task in panels]
  if len(panels) > 1:
    first, *rest = panels
    mosaic = [[first] * len(rest), rest]
  figure = planning.drawing.figure(8.5, 1 + 3.6 * len(mosaic))
  axes = figure.subplot_mosaic(mosaic)
  for task, axis in axes.items():
    for row in panels[task]:
      axis.errorbar(
        *_point(row),
        yerr=_error(row),
        markersize=5,
        capsize=2,
        linestyle='',
        elinewidth=0.8,
        **planning.drawing.style(row['memory']),
      )
    for line in frontiers(panels[task]).values():
      style = planning.drawing.style(line[0]['memory'])
      points = zip(*map(_point, line), strict=True)
      axis.plot(*points, color=style['color'], linewidth=0.8, drawstyle='steps-post', zorder=1)
    axis.set_title(task, fontsize=10)
    axis.set(xlabel='least MiB of a training step on W1', ylabel='accuracy, %')
    planning.drawing.logarithmic(axis)
    axis.margins(0.12)
    axis.grid(alpha=0.3)
  shown = [row for rows in panels.values() for row in rows]
  planning.drawing.legend(figure, (row['memory'] for row in shown))
  for task, axis in axes.items():
    named = [(row['method'], _point(row)) for row in panels[task]]
    planning.drawing.label(axis, named, [_error(row) for row in panels[task]])
  with appearing(path) as part:
    figure.savefig(part, dpi=110)


def _point(row: dict) -> tuple[float, float]:
  """Where a row stands in the plot."""
  return _least(row), 100 * row['accuracy']


def _least(row: dict) -> float | None:
  """The least MiB of a row on W1, however its blocks are recomputed."""
  return row['w1_recomputed_mib'] or row['w1_mib']


def frontiers(found: list[dict]) -> dict[str, list[dict]]:
  """{memory class: its rows that are more accurate than all that need less, the least first}."""
  lines: dict[str, list[dict]] = {}
  for row in sorted(found, key=lambda row: (_least(row), -row['accuracy'])):
    line = lines.setdefault(row['memory'], [])
    if not line or row['accuracy'] > line[-1]['accuracy']:
      line.append(row)
  return lines


def _error(row: dict) -> float:
  """Half the height of its bar: the standard error, 0 of a single run."""
  return 100 * (row['standard_error'] or 0)


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.accuracy', main))
