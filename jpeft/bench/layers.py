"""What one layer costs of a training step: cycles and bytes of memory traffic, by the compiler.

  python -m jpeft.bench.layers [--work=w1] [--methods=lora_all,lora_all_packed]
      [--remat=none,block,packed4] [--layers=unroll,scan] [--target=tpu:v5e]

Compiles whole steps of few layers ahead of time, as `jpeft.bench.memory` does; nothing is run. Of
unrolled layers a row is a step of two less one of one; of a scan, which XLA unrolls where it has
one round, of three less two.

Cycles are libtpu's own estimate of its schedule, a model of the chip: to be compared within a
table, not to be read as a time. Moved is what is read from and written to the device's memory, by
the text of the program; both count every round of loops (`jpeft.programs.schedule`).
"""

import argparse
import dataclasses
import itertools
import sys
from typing import NamedTuple

from jpeft import cli, methods, planning, programs

from .memory import REMATS, planned_work, traced_step
from .works import WORKS


class Cost(NamedTuple):
  """What a layer costs: cycles, and bytes that are read and written."""

  cycles: float
  moved: float


def layer(work: str, method: str, remat: str, layers: str, where: planning.Target) -> Cost:
  """The cost of one layer.

  Args:
    work: of WORKS.
    method: of the registry, or a preset.
    remat: of REMATS.
    layers: 'scan' or 'unroll'.
    where: what to compile for, a TPU.

  Raises:
    ValueError: the method does not act on the work's model, or the compiler estimates no cycles.
  """
  deep = 3 if layers == 'scan' else 2  # XLA writes out a scan of one round
  more = step(work, method, remat, layers, deep, where)
  fewer = step(work, method, remat, layers, deep - 1, where)
  return Cost(more.cycles - fewer.cycles, more.moved - fewer.moved)


def step(
  work: str, method: str, remat: str, layers: str, depth: int, where: planning.Target
) -> programs.Schedule:
  """What a step of a work's model with so many layers does.

  Raises:
    ValueError: the compiler estimates no cycles, or its text cannot be read.
  """
  name, hyperparameters = methods.preset(method)
  chosen = WORKS[work]

  def shallow(scan, remat):
    return chosen.model(scan, remat).clone(depth=depth)

  short = dataclasses.replace(chosen, model=shallow)
  planned = planned_work(short, layers == 'scan', REMATS[remat])
  planned = planned.stored(methods.REGISTRY[name].storage)
  tuned = planned.tuned(methods.make(name, head=chosen.head, **hyperparameters))
  traced, arguments = traced_step(planned, tuned, where)
  found = programs.schedule(programs.compiled(traced, where.options, arguments))
  if found is None or found.cycles is None:
    raise ValueError('the compiler estimates no cycles: give --target=tpu:v5e, or another TPU')
  return found


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.layers',
    description=cli.described(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--work', default='w1', choices=WORKS)
  parser.add_argument('--methods', default='lora_all,lora_all_packed')
  parser.add_argument('--remat', default='none', help=f'of {", ".join(REMATS)}')
  parser.add_argument('--layers', default='unroll,scan')
  parser.add_argument('--target', default='tpu:v5e')
  flags = parser.parse_args(argv)
  chosen = [flags.methods.split(','), flags.remat.split(','), flags.layers.split(',')]
  for given, known in zip(chosen, (None, REMATS, ('unroll', 'scan')), strict=True):
    for name in given:
      if known is not None and name not in known:
        parser.error(f'{name!r} is none of {", ".join(known)}')
  with cli.inputs_checked():
    where = planning.target(flags.target)
    print('| method | remat | layers | kcycles | moved MiB |\n| --- | --- | --- | ---: | ---: |')
    for method, remat, layers in itertools.product(*chosen):
      found = layer(flags.work, method, remat, layers, where)
      row = f'{found.cycles / 1e3:,.0f} | {found.moved / 2**20:,.0f} |'
      print(f'| {method} | {remat} | {layers} | {row}', flush=True)
  return 0


if __name__ == '__main__':
  planning.leave_accelerators()
  sys.exit(cli.command('jpeft.bench.layers', main))
