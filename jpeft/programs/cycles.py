"""The cycles of a compiled TPU program, operation by operation."""

import re
from typing import NamedTuple

import jax

from .compiled_text import Instruction, parsed

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Operation(NamedTuple):
  """What a compiled program runs.

  Attributes:
    cycles: libtpu's own estimate of one run.
    rounds: how often it runs: the rounds of the loops around it.
    text: its line.
  """

  cycles: int
  rounds: int
  text: str


def cycles(program: jax.stages.Compiled) -> int | None:
  """The cycles that libtpu estimates for a program, with all rounds of its loops.

  An estimate is a model of the chip: good to compare two programs, not to be read as a time. What
  waits for memory and the inside of Pallas kernels do not count. Of branches all count, of a loop
  whose rounds are not known one. None if the text has no estimates: another platform's.
  """
  found = operations(program.as_text())
  if not found:
    return None
  return sum(op.cycles * op.rounds for op in found)


def operations(text: str) -> list[Operation]:
  """The operations of a compiled program that have an estimate, inside of its loops too."""
  program = parsed(text)
  found = []
  for run in program.runs():
    if run.part:
      continue
    for instruction in program.computations[run.name].values():
      estimated = cycles_of(instruction)
      if estimated is not None:
        found.append(Operation(estimated, run.rounds, instruction.text))
  return found


def cycles_of(instruction: Instruction) -> int | None:
  """The estimate of one run of an instruction; None where there is none."""
  estimated = _CYCLES.search(instruction.rest)
  return int(estimated[1]) if estimated else None
