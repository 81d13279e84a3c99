"""The time of one update by each method, as a ratio to that of the first, measured in one process.

    python -m jpeft.bench.speed --config=configs/quickstart.py --methods=full,linear,lst,lora
        [--rounds=7] [--json] [--config.KEY=VALUE]

Methods are arguments of the config file; the work is its model and batch size. Every update runs
the backbone, even where the config would keep features (`data.cache_features`). All updates are
compiled first, then run in turn, so that what slows the machine slows all of them; the ratio is the
median over rounds of those within a round. GFLOP are those of the compiled program. Batches are
noise and the labels zeros: time does not depend on them. No pass over examples is made: a method
that trains a narrow model has one as narrow as it will be, and of one whose size follows from the
examples a note says so. What an update does only now and then (a new projection of GaLore) is done
in the first, which is not timed.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from jpeft import cli, tasks, training
from jpeft import config as config_lib
from jpeft.core import bounds
from jpeft.messages import markdown
from jpeft.planning import classes_of

ROUNDS = 7
_STEPS = 1000  # of a learning rate schedule, whose length changes no time


@dataclasses.dataclass
class Update:
  """A compiled update and its state, which each call replaces."""

  fn: Callable
  state: dict
  backbone: dict
  batch: dict
  gflop: float
  bounds: tuple[str, ...] = ()  # what of it would follow from examples

  def seconds(self) -> float:
    """Of one call, to the end of all that it computes."""
    start = time.perf_counter()
    self.state, _ = jax.block_until_ready(self.fn(self.state, self.backbone, self.batch))
    return time.perf_counter() - start


def update_of(config) -> Update:
  """The compiled update of a configuration, on one device."""
  with cli.inputs_checked():
    task = tasks.of(config)
    outputs = classes_of(config)
    pretrained, tuned = training.build(config, outputs, sized=True)
    example = task.example(config, pretrained, outputs)
    _, tx = training.optimizer_of(config, tuned, steps=_STEPS)
  batch = _batch(example, config.data.batch_size)
  step = training.train_step(
    tuned,
    training.Forward(tuned, True),
    tx,
    config.seed,
    task.objective(config, tasks.NO_FACTS),
    config.optimizer.accumulate,
    steps=_STEPS,
  )
  backbone = pretrained.variables
  state = training.initial_state(tuned, tx, backbone, config.seed)
  compiled, cost = training.compiled(step, state, backbone, batch, donate=(0,))
  gflop = cost['flops'] / 1e9
  return Update(
    compiled, state, backbone, jax.device_put(batch), gflop, tuple(bounds(tuned.method))
  )


def _batch(example: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
  """Noise in place of floats, and integers of the example repeated."""
  rng = np.random.default_rng(0)
  batch = {}
  for name, x in example.items():
    if np.issubdtype(x.dtype, np.floating):
      batch[name] = rng.normal(size=(size, *x.shape[1:])).astype(x.dtype)
    else:
      batch[name] = np.repeat(x, size, 0)
  return batch


def compare(updates: dict[str, Update], rounds: int) -> list[dict]:
  """Rows of method, median seconds, GFLOP, and both as ratios to the first method."""
  for update in updates.values():
    update.seconds()  # the first call also allocates
  times = []
  for _ in range(rounds):
    times.append({name: update.seconds() for name, update in updates.items()})
  first = next(iter(updates))
  rows = []
  for name, update in updates.items():
    row = {
      'method': name,
      'seconds': statistics.median(seconds[name] for seconds in times),
      'ratio': statistics.median(seconds[name] / seconds[first] for seconds in times),
      'gflop': update.gflop,
      'gflop_ratio': update.gflop / updates[first].gflop,
    }
    rows.append(row)
  return rows


def table(rows: list[dict]) -> str:
  """The rows as a Markdown table."""
  first = rows[0]['method']
  head = ('method', 'seconds', f'time / {first}', 'GFLOP', f'GFLOP / {first}')
  cells = []
  for row in rows:
    cells.append(
      (
        row['method'],
        f'{row["seconds"]:.3g}',
        f'{row["ratio"]:.2f}',
        f'{row["gflop"]:.4g}',
        f'{row["gflop_ratio"]:.2f}',
      )
    )
  return markdown(head, cells)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.speed',
    description=cli.described(__doc__),
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--methods', required=True, type=lambda text: text.split(','))
  parser.add_argument('--rounds', type=int, default=ROUNDS)
  parser.add_argument('--json', action='store_true')
  flags, rest = parser.parse_known_args(argv)
  with cli.inputs_checked():
    if flags.rounds < 1:
      raise ValueError(f'--rounds={flags.rounds} must be at least 1')
    command = config_lib.parse(rest)
    configs = {}
    for name in flags.methods:
      configs[name] = config_lib.load(f'{command.reference}:{name}', command.overrides)
    # All mistakes before the first update is compiled.
    for config in configs.values():
      training.method_of(config)
  updates = {name: update_of(config) for name, config in configs.items()}
  for name, update in updates.items():
    for bound in update.bounds:
      print(f'{name}: {bound}', file=sys.stderr)
  rows = compare(updates, flags.rounds)
  if flags.json:
    print(json.dumps(rows, indent=1))
  else:
    print(table(rows))
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.speed', main))
