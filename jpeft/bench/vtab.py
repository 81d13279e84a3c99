"""The row of a method on VTAB-1k: accuracies of runs, the means of groups, and where they are from.

    python -m jpeft.bench.vtab [--best] RUN RUN ...

A RUN is the folder of a run with configs/vtab.py, one a task; of several runs of a task the mean is
taken. Two means are printed once all 19 tasks are there, which papers mix up and which lie 2 to 3
points apart: gmean, of the means of the three groups, and mean19, of the tasks. --best takes the
best accuracy of a run in place of that at its end; on test images that is a choice made on them,
and the row says so.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jpeft import cli
from jpeft.data import VTAB_TASKS
from jpeft.messages import markdown

# Where an accuracy comes from.
ONCE = 'tested once, at the end'
CHOICE = 'on val200, for choices'
BEST = 'best on the test images'


class Result(NamedTuple):
  """What a run gives to the row.

  Attributes:
    task: of VTAB_TASKS.
    method: its name.
    accuracy: from 0 to 1.
    protocol: ONCE, CHOICE or BEST.
  """

  task: str
  method: str
  accuracy: float
  protocol: str


def main(argv: list[str]) -> int:
  if cli.asks_help(argv):
    print(cli.described(__doc__))
    return 0
  with cli.inputs_checked():
    best = '--best' in argv
    folders = [argument for argument in argv if argument != '--best']
    unknown = [argument for argument in folders if argument.startswith('-')]
    if unknown or not folders:
      raise ValueError(f'give folders of runs, and --best or not, in place of {" ".join(argv)!r}')
    print(page([result(pathlib.Path(folder), best) for folder in folders]))
  return 0


def result(folder: pathlib.Path, best: bool = False) -> Result:
  """What a run folder has.

  Args:
    folder: of a run that is complete.
    best: the best accuracy in place of the last.

  Raises:
    FileNotFoundError: no report in it.
    ValueError: a run on other data than a task of VTAB-1k.
  """
  for file in ('config.json', 'report.json'):
    if not (folder / file).is_file():
      raise FileNotFoundError(f'there is no {file} in {folder}: a run has one when it is complete')
  config = json.loads((folder / 'config.json').read_text())
  report = json.loads((folder / 'report.json').read_text())
  data = config['data']
  kind, _, path = data['name'].partition(':')
  task = pathlib.Path(path).name
  if kind != 'vtab' or task not in VTAB_TASKS:
    raise ValueError(f'{folder} is a run on {data["name"]}, not on a task of VTAB-1k')
  accuracy = report['best']['value'] if best else report['eval']['accuracy']
  return Result(task, config['method']['name'], accuracy, protocol(data, best))


def protocol(data: Mapping[str, Any], best: bool) -> str:
  """Where an accuracy comes from, by the splits of a run.

  Raises:
    ValueError: other splits than those of configs/vtab.py.
  """
  splits = data['train'], data['test']
  if splits == ('train800', 'val200'):
    return CHOICE
  if splits == ('train800val200', 'test'):
    return BEST if best else ONCE
  raise ValueError(
    f'a run trained on {splits[0]} and scored on {splits[1]} is in no row of VTAB-1k: '
    'configs/vtab.py has the splits'
  )


def page(results: Sequence[Result]) -> str:
  """The tables of all methods, a line a task.

  Raises:
    ValueError: results of several methods or protocols, which would make one row of both.
  """
  kinds = sorted({(found.method, found.protocol) for found in results})
  if len(kinds) > 1:
    listed = '; '.join(', '.join(kind) for kind in kinds)
    raise ValueError(f'one row is of one method and one protocol, and these runs are of {listed}')
  (method, how), *_ = kinds
  accuracies: dict[str, list[float]] = {}
  for found in results:
    accuracies.setdefault(found.task, []).append(found.accuracy)
  row = {task: 100 * statistics.mean(found) for task, found in accuracies.items()}
  lines = [
    (task, f'{row[task]:.1f} %', str(len(accuracies[task]))) for task in VTAB_TASKS if task in row
  ]
  lines += [(name, f'{value:.2f} %', '') for name, value in means(row).items()]
  missing = [task for task in VTAB_TASKS if task not in row]
  text = f'{method}, {how}\n\n{markdown(("task", "accuracy", "runs"), lines)}'
  if missing:
    text += f'\n\nNo means over tasks: there is no run of {", ".join(missing)}.'
  return text


def means(row: Mapping[str, float]) -> dict[str, float]:
  """The mean of each group that is whole, then gmean and mean19 if all are.

  Args:
    row: {task: accuracy}.
  """
  groups: dict[str, list[str]] = {}
  for name, task in VTAB_TASKS.items():
    groups.setdefault(task.group, []).append(name)
  found = {}
  for group, tasks in groups.items():
    if all(task in row for task in tasks):
      found[group] = statistics.mean(row[task] for task in tasks)
  if len(found) == len(groups):
    gmean = statistics.mean(found.values())
    found |= {'gmean': gmean, 'mean19': statistics.mean(row[task] for task in VTAB_TASKS)}
  return found


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.vtab', main))
