"""The registry as a table: `python -m jpeft.methods [--json]`."""

import argparse
import inspect
import json

from . import REGISTRY


def rows() -> list[dict]:
  """One row a method: name, paper, memory class, whether it merges, hyperparameters with their
  defaults.
  """
  parameters = lambda make: {n: p.default for n, p in inspect.signature(make).parameters.items()}
  return [
    {
      'name': name,
      'title': e.title,
      'paper': e.paper,
      'memory': e.memory,
      'mergeable': e.mergeable,
      'hyperparameters': {
        n: None if d is inspect.Parameter.empty else d for n, d in parameters(e.make).items()
      },
    }
    for name, e in REGISTRY.items()
  ]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser('python -m jpeft.methods', description='The methods of jpeft.')
  parser.add_argument('--json', action='store_true', help='the same as JSON, with hyperparameters')
  if parser.parse_args(argv).json:
    print(json.dumps(rows(), indent=2))
    return
  table = [('method', 'paper', 'memory class', 'merges', 'what it is')]
  table += [
    (r['name'], r['paper'], r['memory'], 'yes' if r['mergeable'] else 'no', r['title'])
    for r in rows()
  ]
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  for row in table:
    print('  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


if __name__ == '__main__':
  main()
