r"""Methods x tasks x seeds: how well each method does what the others do.

    python -m jpeft.bench.accuracy --tasks=quickstart,sentiment,emoji \
        --methods=linear,lst,lora --seeds=0,1,2
    python -m jpeft.bench.accuracy --json

A task is a file of configs/ and a method an argument of it, so a cell of the table is the run that
`python -m jpeft.train --config=configs/TASK.py:METHOD --config.seed=SEED` makes. Runs are kept
below --out: those that are complete are not trained again, and one that was stopped goes on, so the
same command may be given until the table is whole.

What a run came to replaces the run of the same task, method and seed in docs/accuracy.json, from
which docs/accuracy.md and a plot of accuracy against memory are drawn, so that the table can be
made in parts; runs of a method under settings that its config no longer has leave it. With --json
the rows of the runs asked for go to stdout and no document is touched. --only-table trains nothing
and shows what there is.

Step times are those of docs/speed/TASK.json, which is what
`python -m jpeft.bench.speed --config=configs/TASK.py --methods=full,... --json` prints.
"""

import functools
import json
import math
import pathlib
import statistics
import sys

from jpeft import cli, training
from jpeft import config as config_lib
from jpeft.training import write

from . import memory, records

TASKS = {
  'quickstart': 'DINOv2-S/14-architecture weights on 1,000 MNIST digits at 56 pixels, 1,000 others to test',
  'sentiment': 'MiniLM-L6 on 7,030 sentences of movie reviews, 3,042 others to test',
  'emoji': 'DINOv2-S/14-architecture weights on 1,324 emoji of 9 Unicode groups at 112 pixels, 582 others to test',
}
METHODS = ('linear', 'lst', 'bitfit', 'ssf', 'lora', 'adaptformer', 'vpt_deep', 'full')
KEY = ('task', 'method', 'seed')
FLAGS = {
  'tasks': ','.join(TASKS),
  'methods': ','.join(METHODS),
  'seeds': '0,1,2',
  'configs': 'configs',
  'out': 'runs/accuracy',
  'docs': 'docs/accuracy.md',
  'json': None,
  'only-table': None,
}


def main(argv: list[str]) -> int:
  with cli.inputs_checked():
    flags = parse(argv)
    tasks, methods, seeds = (flags[name].split(',') for name in ('tasks', 'methods', 'seeds'))
    folder, configs, file = (pathlib.Path(flags[name]) for name in ('out', 'configs', 'docs'))
    # All of them before the first is trained, and whole tables of fewer seeds first.
    wanted = {
      (task, method, seed): config_lib.load(
        f'{configs / task}.py:{method}', {'seed': seed, 'baseline': 'none'}
      )
      for seed in seeds
      for task in tasks
      for method in methods
    }
    for config in wanted.values():
      training.method_of(config)
  file.parent.mkdir(parents=True, exist_ok=True)
  cells = []
  for (task, method, seed), config in wanted.items():
    there = folder / task / f'{method}-{seed}'
    if 'only-table' not in flags:
      told = training.train(config, there)
    elif (there / 'report.json').exists():
      told = json.loads((there / 'report.json').read_text())
    else:
      continue
    cells.append(cell(task, method, config, told))
    if not {'json', 'only-table'} & set(flags):
      publish(
        file, cells[-1:]
      )  # at once: the table is there in part, should the rest be interrupted
  if 'json' in flags:
    print(json.dumps(rows(cells), indent=2))
  else:
    print(publish(file, cells))
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
      raise ValueError(
        f'--{name} takes no value' if equals else f'--{name} needs a value: --{name}=VALUE'
      )
    flags[name] = value
  if not all(seed.isdigit() for seed in flags['seeds'].split(',')):
    raise ValueError(f'--seeds={flags["seeds"]} is not a list of numbers such as 0,1,2')
  return flags


def cell(task: str, method: str, config, told: dict) -> dict:
  """What docs/accuracy.json keeps of a run, from its config and its report.json."""
  return {
    'task': task,
    'method': method,
    'seed': config.seed,
    'accuracy': told['eval']['accuracy'],
    'trainable': told['trainable'],
    'total': told['total'],
    'memory': told['memory'],
    'steps': told['steps'],
    'step_gflop': told['step_cost']['flops'] / 1e9,
    'settings': settings(config),
  }


def settings(config) -> str:
  """What a config sets for each method: hyperparameters, learning rate, length of training."""
  given = {
    **config.method,
    'lr': config.optimizer.lr,
    'epochs': config.epochs,
    'steps': config.steps,
  }
  return ', '.join(f'{k}={v}' for k, v in given.items() if v is not None)


def rows(cells: list[dict]) -> list[dict]:
  """Runs summed over seeds, task by task, the most accurate first."""
  groups: dict[tuple, list[dict]] = {}
  for one in cells:
    groups.setdefault((one['task'], one['method']), []).append(one)
  found = [summed(group) for group in groups.values()]
  tasks = list(TASKS)
  return sorted(
    found,
    key=lambda r: (tasks.index(r['task']) if r['task'] in tasks else len(tasks), -r['accuracy']),
  )


def summed(cells: list[dict]) -> dict:
  """One row, of the runs of a method: the mean accuracy at the end of training, its standard error
  over seeds.
  """
  scores, one = [c['accuracy'] for c in cells], cells[0]
  error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
  return {
    **{k: v for k, v in one.items() if k != 'seed'},
    'accuracy': statistics.mean(scores),
    'standard_error': error,
    'seeds': len(scores),
    'accuracies': scores,
    'w1_mib': w1_mib(one['method']),
  }


def publish(file: pathlib.Path, cells: list[dict]) -> str:
  """Records runs beside `file`, a Markdown page, and draws it again; returns its text."""
  kept = file.with_suffix('.json')
  now = {(c['task'], c['method']): c['settings'] for c in cells}
  stale = [
    c
    for c in records.recorded(kept)
    if now.get((c['task'], c['method']), c['settings']) != c['settings']
  ]
  for one in stale:
    print(
      f'{one["task"]} {one["method"]}, seed {one["seed"]}, leaves the table: it was trained with '
      f'{one["settings"]}',
      file=sys.stderr,
    )
  found = rows(records.record(kept, cells, KEY, drop=stale))
  times = {
    task: records.recorded(file.parent / 'speed' / f'{task}.json')
    for task in {r['task'] for r in found}
  }
  for row in found:
    row['time'] = next(
      (t['ratio'] for t in times[row['task']] if t['method'] == row['method']), None
    )
  draw(found, file.with_suffix('.png'))
  text = page(found, file.with_suffix('.png').name)
  write(file, text)
  return text


@functools.cache
def w1_mib(method: str) -> float | None:
  """The least total that docs/memory.json has of a method on W1 without remat, if any; else
  None.
  """
  found = [
    r['total_mib']
    for r in memory.recorded()
    if (r['work'], r['method'], r['remat']) == ('w1', method, 'none')
  ]
  return min(found, default=None)


def page(found: list[dict], plot: str) -> str:
  """The rows as a Markdown page, a table for each task, and the name of the plot."""
  lines = [
    '# Accuracy',
    '',
    'Accuracy on the test split at the end of training, mean and standard error over seeds; '
    'the test split is the same for all. GFLOP are of one update, as compiled: where no backbone backprop '
    'happens, features of the backbone are made once an example and kept. Time is that of an update that runs '
    'the backbone, as a ratio to full fine-tuning in one process on two CPU cores. W1 is the training step of '
    "[memory.md](memory.md), there with the method's defaults, scanned or unrolled, whichever takes less "
    'memory.',
    '',
    'Made by `python -m jpeft.bench.accuracy`, in parts; [accuracy.json](accuracy.json) has each '
    'run with its settings.',
    '',
    f'![accuracy against memory]({plot})',
  ]
  for task in dict.fromkeys(row['task'] for row in found):
    told = [row for row in found if row['task'] == task]
    lines += [
      '',
      f'## {task}',
      '',
      f'{TASKS.get(task, task)}.',
      '',
      training.markdown(
        (
          'method',
          'accuracy',
          'seeds',
          'trainable',
          'of backbone',
          'updates',
          'GFLOP',
          'time',
          'W1 MiB',
          'memory class',
        ),
        [
          (
            row['method'],
            percent(row),
            str(row['seeds']),
            f'{row["trainable"]:,}',
            f'{100 * row["trainable"] / row["total"]:.2f} %',
            f'{row["steps"]:,}',
            f'{row["step_gflop"]:.3g}',
            shown(row['time'], '.2f'),
            shown(row['w1_mib'], ',.0f'),
            row['memory'],
          )
          for row in told
        ],
      ),
    ]
  return '\n'.join([*lines, ''])


def shown(value: float | None, form: str) -> str:
  return '-' if value is None else format(value, form)


def draw(found: list[dict], path: pathlib.Path) -> None:
  """Accuracy against the memory of W1, a panel a task."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  found = [row for row in found if row['w1_mib'] is not None]
  tasks = list(dict.fromkeys(row['task'] for row in found)) or [
    'none of these methods has a row of W1'
  ]
  figure = Figure(figsize=(5.5 * len(tasks), 4.2), layout='constrained')
  canvas, axes = FigureCanvasAgg(figure), figure.subplot_mosaic([tasks])
  for task, axis in axes.items():
    for row in (row for row in found if row['task'] == task):
      point = row['w1_mib'], 100 * row['accuracy']
      axis.errorbar(
        *point,
        yerr=100 * (row['standard_error'] or 0),
        fmt='o',
        color='C0',
        markersize=5,
        capsize=2,
      )
    axis.set(title=task, xlabel='MiB of a training step on W1', ylabel='% right', xscale='log')
    axis.margins(x=0.25)  # names stand to the right of their points
    axis.set_xticks([200, 500, 1000, 2000], ['200', '500', '1,000', '2,000'])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  canvas.draw()  # places the axes
  for task, axis in axes.items():
    told = (row for row in found if row['task'] == task)
    memory.label(axis, [(row['method'], (row['w1_mib'], 100 * row['accuracy'])) for row in told])
  figure.savefig(path, dpi=110)


def percent(row: dict) -> str:
  error = row['standard_error']
  return f'{100 * row["accuracy"]:.1f}' + ('' if error is None else f' ± {100 * error:.1f}') + ' %'


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.accuracy', main))
