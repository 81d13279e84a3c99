"""The registry as a table: `python -m jpeft.methods [--json]`."""

import argparse
import inspect
import json
from collections.abc import Callable

from jpeft.messages import columns

from . import REGISTRY


def rows() -> list[dict]:
  """One row a method: name, title, paper, memory class, whether it merges, hyperparameters.

  Hyperparameters have their defaults, None where there is none.
  """
  return [
    {
      'name': name,
      'title': entry.title,
      'paper': entry.paper,
      'memory': entry.memory,
      'mergeable': entry.mergeable,
      'hyperparameters': _defaults(entry.make),
    }
    for name, entry in REGISTRY.items()
  ]


def _defaults(make: Callable) -> dict:
  defaults = {}
  for name, parameter in inspect.signature(make).parameters.items():
    defaults[name] = parameter.default
    if parameter.default is inspect.Parameter.empty:
      defaults[name] = None
  return defaults


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser('python -m jpeft.methods', description='The methods of jpeft.')
  parser.add_argument('--json', action='store_true', help='the same as JSON, with hyperparameters')
  if parser.parse_args(argv).json:
    print(json.dumps(rows(), indent=2))
    return
  table = [('method', 'paper', 'memory class', 'merges', 'what it is')]
  for row in rows():
    merges = 'yes' if row['mergeable'] else 'no'
    table.append((row['name'], row['paper'], row['memory'], merges, row['title']))
  for line in columns(table):
    print(line)


if __name__ == '__main__':
  main()
