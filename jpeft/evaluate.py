"""Scores of a run, on its test split or on other examples.

    python -m jpeft.evaluate --run runs/a
    python -m jpeft.evaluate --run runs/a --config.data.test='train[1000:2000]' --json
    python -m jpeft.evaluate --run runs/a --config.data.name=csv:new.csv --out scores/

--config.KEY=VALUE gives other examples (data.name, data.test), other metrics (eval.also) or other
devices (mesh.data) than those of the run. What was trained stays as it is. Of a run that trained on
a narrow model, the whole one is scored.
"""

import json
import pathlib
import sys

from jpeft import cli, training
from jpeft import config as config_lib


def main(argv: list[str]) -> int:
  parser = cli.run_parser('jpeft.evaluate', __doc__)
  parser.add_argument('--json', action='store_true', help='one JSON object')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    help='folder to write scores and tables of the labels to, new or empty',
  )
  with cli.inputs_checked():
    overrides, rest = config_lib.overrides_of(argv)
  flags = parser.parse_args(rest)
  found = training.scored(flags.run, overrides, flags.best, flags.out)
  if flags.json:
    print(json.dumps(found.as_json()))
  else:
    print(training.line(found.about, found.values))
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.evaluate', main))
