"""What one layer costs of a training step: cycles and bytes of memory traffic, by the compiler.

  python -m jpeft.bench.layers [--work=w1] [--methods=lora_all,lora_all_packed]
      [--remat=none,block,packed4] [--layers=unroll,scan] [--target=tpu:v5e]

Compiles whole steps of few layers ahead of time, as `jpeft.bench.memory` does; nothing is run. Of
unrolled layers a row is two layers less one. Of a scan, which XLA's analysis of bytes counts one
round of, cycles are those of one round of its loops, and bytes those of one round and of what is
around the loops.

Cycles are libtpu's own estimate of its schedule, a model of the chip: to be compared within a
table, not to be read as a time. Moved is what XLA's cost analysis says is read and written.
"""

import argparse
import dataclasses
import itertools
import sys
from typing import NamedTuple

import jax
import optax

from jpeft import cli, methods, planning, programs, training

from .memory import REMATS, planned_work
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
  two = step(work, method, remat, layers, 2, where)
  if layers == 'scan':
    inside = [op for op in _operations(two) if op.rounds > 1]
    return Cost(sum(op.cycles for op in inside), _moved(two))
  one = step(work, method, remat, layers, 1, where)
  found = [sum(op.cycles * op.rounds for op in _operations(program)) for program in (two, one)]
  return Cost(found[0] - found[1], _moved(two) - _moved(one))


def step(
  work: str, method: str, remat: str, layers: str, depth: int, where: planning.Target
) -> jax.stages.Compiled:
  """A compiled step of a work's model with so many layers."""
  name, hyperparameters = methods.preset(method)
  chosen = WORKS[work]

  def shallow(scan, remat):
    return chosen.model(scan, remat).clone(depth=depth)

  short = dataclasses.replace(chosen, model=shallow)
  planned = planned_work(short, layers == 'scan', REMATS[remat])
  planned = planned.stored(methods.REGISTRY[name].storage)
  tuned = planned.tuned(methods.make(name, head=chosen.head, **hyperparameters))
  tx = training.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-3))
  state = training.state_shapes(tuned, tx, planned.variables)
  shapes = planned.placed(where.mesh(), state, planned.size)
  forward = training.Forward(tuned, True, planned.mode(True))
  step = training.train_step(tuned, forward, tx, 0, steps=planning.STEPS)
  traced = jax.jit(step, donate_argnums=0).trace(*shapes)
  return programs.compiled(traced, where.options, programs.nbytes(shapes))


def _operations(program) -> list[programs.Operation]:
  found = programs.operations(program.as_text())
  if not found:
    raise ValueError('the compiler estimates no cycles: give --target=tpu:v5e, or another TPU')
  return found


def _moved(program) -> float:
  return program.cost_analysis()['bytes accessed']


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
