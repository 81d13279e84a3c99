"""The cycles and bytes of a compiled TPU program, read from its text."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

_HEAD = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_LIMIT = re.compile(r'= s32\[\]\S* constant\((\d+)\)')
_RUN = re.compile(r'(?:body|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_RUNNERS = re.compile(r' (while|call|conditional)\(')


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
  computations, entry = _computations(text)
  return list(_operations(computations, entry, 1))


def _operations(computations: dict, name: str, rounds: int) -> Iterator[Operation]:
  for line in computations.get(name, ()):
    estimated = _CYCLES.search(line)
    if estimated:
      yield Operation(int(estimated.group(1)), rounds, line)
    if _RUNNERS.search(line):
      inner_rounds = rounds * _rounds(computations, line)
      inner = _RUN.findall(line)
      for branches in _BRANCHES.findall(line):
        inner += [branch.strip(' %') for branch in branches.split(',')]
      for called in inner:
        yield from _operations(computations, called, inner_rounds)


def _rounds(computations: dict, line: str) -> int:
  """How often a loop runs its body: the one number that its condition compares with, else 1."""
  condition = _CONDITION.search(line)
  if condition is None:
    return 1
  limits = _LIMIT.findall('\n'.join(computations.get(condition.group(1), ())))
  if len(limits) != 1:
    return 1
  return int(limits[0])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({name of a computation: its lines}, the name of the program's own)."""
  computations = {}
  entry = ''
  lines: list[str] = []
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      lines = computations.setdefault(head.group('name'), [])
      if head.group('entry'):
        entry = head.group('name')
    else:
      lines.append(line)
  return computations, entry
