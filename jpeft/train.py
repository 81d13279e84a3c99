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

Started on several hosts, the processes share the run: they find each other on TPU pods (GKE; with
--hosts=auto on Cloud TPU) and under SLURM and Open MPI; elsewhere by --hosts=ADDRESS:PORT of
process 0, --processes=N and --process=I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. --hosts=none keeps a process alone. They wait --connect-timeout=300 seconds for each
other, and one that has not answered for --lost-after=100 seconds ends all.

--allow=KEY,... goes on with a run where these are others than before: mesh, hosts (the number of
processes), data.name, data.dir, model.source and method.start (another place of the same), steps,
epochs, checkpoint, log. The report tells what was changed.

Exit codes: 0 complete; 1 a loss is not finite, or another process is lost (also 134); 2 a mistake
in config, data or files, or a full disk, told in one sentence (--traceback shows where it arose);
143, 130, 129, 138 and 140 after SIGTERM, Ctrl-C, SIGHUP, SIGUSR1 and SIGUSR2, with a checkpoint
written.
"""

import argparse
import sys
from collections.abc import Sequence

from jpeft import cli, training
from jpeft import config as config_lib
from jpeft.training import train


def main(argv: list[str]) -> int:
  if cli.asks_help(argv):
    print(cli.described(__doc__), config_lib.reference(cli.width()), sep='\n\n')
    return 0
  with cli.inputs_checked():
    joining, allow, rest = _flags(argv)
    command = config_lib.parse(rest)
    config = command.load()
    folder = command.folder()
    baseline = None
    if config.baseline:
      baseline = command.baseline(config.baseline).load()
    training.join(joining)
  with training.last_words(), training.resumable(folder):
    reports = [train(config, folder, allow)]
  if baseline:
    beside = folder / config.baseline
    with training.last_words(), training.resumable(beside):
      reports.append(train(baseline, beside, allow))
  if training.first():
    print(training.table(reports))
  return 0


def _flags(argv: Sequence[str]) -> tuple[training.Joining, list[str], list[str]]:
  """(how this process finds others, what may have changed, the other arguments).

  Raises:
    ValueError: a value that a flag does not take.
  """
  default = training.Joining()
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  parser.add_argument('--hosts')
  parser.add_argument('--processes', type=int)
  parser.add_argument('--process', type=int)
  parser.add_argument('--connect-timeout', type=int, default=default.connect, dest='connect')
  parser.add_argument('--lost-after', type=int, default=default.lost, dest='lost')
  parser.add_argument('--allow', default='')
  try:
    found, rest = parser.parse_known_args(list(argv))
  except argparse.ArgumentError as error:
    raise ValueError(str(error)) from None
  values = vars(found)
  allow = [name.strip() for name in values.pop('allow').split(',') if name.strip()]
  return training.Joining(**values), allow, rest


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.train', main))
