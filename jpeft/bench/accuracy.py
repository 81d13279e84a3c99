"""Methods x tasks x seeds: how well each method does what the others do.

    python -m jpeft.bench.accuracy --tasks=quickstart,sentiment,emoji --methods=linear,lst,lora --seeds=0,1,2
    python -m jpeft.bench.accuracy --json

A task is a file of configs/ and a method an argument of it, so a cell of the table is the run that
`python -m jpeft.train --config=configs/TASK.py:METHOD --config.seed=SEED` makes. Runs are kept below --out:
those that are complete are not trained again, and one that was stopped goes on, so the same command may be
given until the table is whole. --json prints a list of rows on stdout; without it docs/accuracy.md is
written, and beside it a plot of accuracy against memory. --only-table trains nothing and shows what there is.
"""

import functools
import json
import math
import pathlib
import statistics
import sys

from .. import config as config_lib
from .. import report, run, train
from ..checkpoint import write
from . import memory

TASKS = {
  'quickstart': 'DINOv2-S/14-architecture weights on 1,000 MNIST digits at 56 pixels, 1,000 others to test',
  'sentiment': 'MiniLM-L6 on 7,030 sentences of movie reviews, 3,042 others to test',
  'emoji': 'DINOv2-S/14-architecture weights on 1,324 emoji of 9 Unicode groups at 112 pixels, 582 others to test',
}
METHODS = ('linear', 'lst', 'bitfit', 'ssf', 'lora', 'adaptformer', 'vpt_deep', 'full')
FLAGS = {'tasks': ','.join(TASKS), 'methods': ','.join(METHODS), 'seeds': '0,1,2', 'configs': 'configs',
         'out': 'runs/accuracy', 'docs': 'docs/accuracy.md', 'json': None, 'only-table': None}


def main(argv: list[str]) -> int:
  with run.inputs_checked():
    flags = parse(argv)
    tasks, methods = flags['tasks'].split(','), flags['methods'].split(',')
    seeds = [int(s) for s in flags['seeds'].split(',')]
    folder, configs, file = (pathlib.Path(flags[name]) for name in ('out', 'configs', 'docs'))
    file.parent.mkdir(parents=True, exist_ok=True)
    for task in tasks:
      for method in methods:  # all of them before the first is trained
        run.method_of(config_lib.load(f'{configs / task}.py:{method}'))
  cells = {}
  for seed in seeds:  # whole tables of fewer seeds first
    for task in tasks:
      for method in methods:
        there = folder / task / f'{method}-{seed}'
        if 'only-table' not in flags:
          with run.inputs_checked():
            config = config_lib.load(f'{configs / task}.py:{method}', {'seed': str(seed), 'baseline': 'none'})
          cells[task, method, seed] = train.train(config, there)
        elif (there / 'report.json').exists():
          cells[task, method, seed] = json.loads((there / 'report.json').read_text())
  rows = [summed(task, method, [r for (t, m, _), r in cells.items() if (t, m) == (task, method)])
          for task in tasks for method in methods if any(k[:2] == (task, method) for k in cells)]
  if 'json' in flags:
    print(json.dumps(rows, indent=2))
  else:
    shown = [a for a in argv if a.partition('=')[0] in ('--tasks', '--methods', '--seeds')]  # what decides the numbers
    text = page(rows, ' '.join(['python -m jpeft.bench.accuracy', *shown]), file.with_suffix('.png').name)
    write(file, text)
    draw(rows, file.with_suffix('.png'))
    print(text)
  return 0


def parse(argv: list[str]) -> dict[str, str | None]:
  """{flag: value} over the defaults; --json and --only-table are there or not.

  Raises:
    ValueError: an unknown flag, a flag without a value, or a seed that is no number.
  """
  flags = {name: value for name, value in FLAGS.items() if value is not None}
  for argument in argv:
    name, equals, value = argument.removeprefix('--').partition('=')
    if not argument.startswith('--') or name not in FLAGS:
      raise ValueError(f'unknown argument {argument!r}{config_lib.nearest(name, FLAGS)}')
    if (FLAGS[name] is None) == bool(equals):
      raise ValueError(f'--{name} takes no value' if equals else f'--{name} needs a value: --{name}=VALUE')
    flags[name] = value
  if not all(seed.isdigit() for seed in flags['seeds'].split(',')):
    raise ValueError(f'--seeds={flags["seeds"]} is not a list of numbers such as 0,1,2')
  return flags


def summed(task: str, method: str, reports: list[dict]) -> dict:
  """One row: the mean accuracy at the end of training, and its standard error over seeds."""
  scores = [r['eval']['accuracy'] for r in reports]
  error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
  return {'task': task, 'method': method, 'accuracy': statistics.mean(scores), 'standard_error': error,
          'seeds': len(scores), 'accuracies': scores, 'trainable': reports[0]['trainable'],
          'total': reports[0]['total'], 'memory': reports[0]['memory'], 'w1_mib': w1_mib(method),
          'steps': reports[0]['steps'], 'step_gflop': reports[0]['step_cost']['flops'] / 1e9,
          'seconds': statistics.mean(r['seconds'] for r in reports)}


@functools.cache
def w1_mib(method: str) -> float | None:
  """The least total that docs/memory.json has of a method on W1 without remat, if any; else None."""
  found = [r['total_mib'] for r in memory.recorded() if (r['work'], r['method'], r['remat']) == ('w1', method, 'none')]
  return min(found, default=None)


def page(rows: list[dict], command: str, plot: str) -> str:
  """The rows as a Markdown page, a table for each task, and the name of the plot."""
  lines = ['# Accuracy', '', f'`{command}`: accuracy on the test split at the end of training, mean and standard '
           'error over seeds; the test split is the same for all. GFLOP are of one update, as compiled: where no '
           'backbone backprop happens, features of the backbone are made once an example and kept. W1 is the training '
           "step of [memory.md](memory.md), there with the method's defaults, scanned or unrolled, whichever takes "
           'less memory.', '', f'![accuracy against memory]({plot})']
  for task in dict.fromkeys(row['task'] for row in rows):
    told = [row for row in rows if row['task'] == task]
    lines += ['', f'## {task}', '', f'{TASKS.get(task, task)}.', '', report.markdown(
      ('method', 'accuracy', 'seeds', 'trainable', 'of backbone', 'updates', 'GFLOP', 'W1 MiB', 'memory class'),
      [(row['method'], percent(row), str(row['seeds']), f'{row["trainable"]:,}',
        f'{100 * row["trainable"] / row["total"]:.2f} %', f'{row["steps"]:,}', f'{row["step_gflop"]:.3g}',
        '-' if row['w1_mib'] is None else f'{row["w1_mib"]:,.0f}', row['memory']) for row in told])]
  return '\n'.join([*lines, ''])


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Accuracy against the memory of W1, a panel a task."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  rows = [row for row in rows if row['w1_mib'] is not None]
  tasks = list(dict.fromkeys(row['task'] for row in rows)) or ['none of these methods has a row of W1']
  figure = Figure(figsize=(5.5 * len(tasks), 4.2), layout='constrained')
  canvas, axes = FigureCanvasAgg(figure), figure.subplot_mosaic([tasks])
  for task, axis in axes.items():
    for row in (row for row in rows if row['task'] == task):
      point = row['w1_mib'], 100 * row['accuracy']
      axis.errorbar(*point, yerr=100 * (row['standard_error'] or 0), fmt='o', color='C0', markersize=5, capsize=2)
    axis.set(title=task, xlabel='MiB of a training step on W1', ylabel='% right', xscale='log')
    axis.margins(x=0.25)  # names stand to the right of their points
    axis.set_xticks([200, 500, 1000, 2000], ['200', '500', '1,000', '2,000'])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  canvas.draw()  # places the axes
  for task, axis in axes.items():
    memory.label(axis, [(row['method'], (row['w1_mib'], 100 * row['accuracy'])) for row in rows if row['task'] == task])
  figure.savefig(path, dpi=110)


def percent(row: dict) -> str:
  error = row['standard_error']
  return f'{100 * row["accuracy"]:.1f}' + ('' if error is None else f' ± {100 * error:.1f}') + ' %'


if __name__ == '__main__':
  sys.exit(run.command('jpeft.bench.accuracy', main))
