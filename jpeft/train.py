r"""Trains a method on a backbone and a data set.

    python -m jpeft.train --config=configs/quickstart.py:lst \
        --config.optimizer.lr=1e-3 --workdir=runs/a

--config takes a file of your own or the name of a config that comes with jpeft, such as
quickstart:lst; `jpeft config` lists them, and `jpeft config NAME` prints all values of one.

The run folder gets config.json, metrics.jsonl, checkpoints, theta.safetensors (the end),
best.safetensors (the best evaluation), report.json, report.md and curves.png. Started again with
the same command, a run that was killed goes on from its last checkpoint and ends with the same bits
(on a GPU with XLA_FLAGS= --xla_gpu_deterministic_ops=true); one that is complete prints its report.
--import MODULE imports a module or a .py file first, such as one that registers a method.

Exit codes: 0 complete; 1 a loss is not finite; 2 a mistake in config, data or files, or a full
disk, told in one sentence (--traceback shows where it arose); 143, 130, 129, 138 and 140 after
SIGTERM, Ctrl-C, SIGHUP, SIGUSR1 and SIGUSR2, with a checkpoint written.
"""

import sys

from jpeft import cli, training
from jpeft import config as config_lib
from jpeft.training import train


def main(argv: list[str]) -> int:
  if cli.asks_help(argv):
    print(cli.described(__doc__), config_lib.reference(cli.width()), sep='\n\n')
    return 0
  with cli.inputs_checked():
    command = config_lib.parse(argv)
    config = command.load()
    folder = command.folder()
    baseline = None
    if config.baseline:
      baseline = command.baseline(config.baseline).load()
  with training.resumable(folder):
    reports = [train(config, folder)]
  if baseline:
    beside = folder / config.baseline
    with training.resumable(beside):
      reports.append(train(baseline, beside))
  print(training.table(reports))
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.train', main))
