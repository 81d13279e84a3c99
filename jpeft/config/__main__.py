"""Prints the whole configuration that a config makes, defaults included.

    python -m jpeft.config                       # the configs that come with jpeft
    python -m jpeft.config quickstart:lora
    python -m jpeft.config FILE.py --config.optimizer.lr=1e-3 --json

A line is what follows --config. on the command line; --json prints config.json of a run folder.
"""

import ast
import sys

from jpeft import cli
from jpeft.messages import entries

from . import listing, packaged, parse, to_json


def main(argv: list[str]) -> int:
  flags, rest = _parser().parse_known_args(argv)
  if flags.config is None and not rest:
    print(names())
    return 0
  if flags.config is not None:
    rest = [f'--config={flags.config}', *rest]
  with cli.inputs_checked():
    config = parse(rest).load()
  if flags.json:
    print(to_json(config), end='')
  else:
    print(listing(config))
  return 0


def names() -> str:
  """The configs that come with jpeft, a line each."""
  rows = []
  for name, file in packaged().items():
    doc = ast.get_docstring(ast.parse(file.read_text()))
    rows.append((name, doc.splitlines()[0]))
  return '\n'.join(
    [*entries(rows, cli.width()), '', 'jpeft config NAME[:METHOD] prints one as a whole.']
  )


def _parser():
  found = cli.parser('jpeft.config', __doc__)
  found.add_argument(
    'config',
    nargs='?',
    metavar='CONFIG',
    help='NAME, NAME:ARG, FILE.py or FILE.py:ARG; without it, the names of those that come with '
    'jpeft. --config.KEY=VALUE overrides a value',
  )
  found.add_argument('--json', action='store_true', help='as config.json of a run folder')
  return found


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.config', main))
