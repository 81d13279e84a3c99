"""What a compiled program takes of its device's time, with every round of its loops.

Read from the text of the program: the estimate of cycles that the compiler of TPUs writes beside
each operation, and the bytes that are read and written. XLA's analysis of costs counts the body of
a loop once, gives no cycles, and counts what stays on the chip.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import jax

from .compiled_text import Computation, Instruction, Unreadable, computations, root_of


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What a program does on one device.

  Attributes:
    cycles: the compiler's estimate of all that runs; None where it has none. It is a model of the
      chip: to be compared, not to be read as a speed.
    products: those of matrix products and convolutions, with what is fused to them.
    moved: bytes that operations read from the device's memory and write to it, without what stays
      on the chip. A kernel written by hand counts as one that reads all it is given.
    kernels: calls of such kernels, for which the compiler has no cycles.
  """

  cycles: float | None
  products: float
  moved: float
  kernels: float


def schedule(program: jax.stages.Compiled) -> Schedule | None:
  """What a program does on its device; None if it, or the rounds of a loop, cannot be read."""
  try:
    text = program.as_text()
  except jax.errors.JaxRuntimeError:  # libtpu cannot print some programs that it compiles for v6e
    return None
  return scheduled(text)


def scheduled(text: str | None) -> Schedule | None:
  """The same of the text of a compiled program, None where the compiler gives none."""
  if text is None:
    return None
  try:
    known, entry = computations(text)
    found = _Program(known).run(entry)
  except (ValueError, LookupError):  # written in a way that is not known here
    return None
  if 'estimated_cycles' not in text:
    return dataclasses.replace(found, cycles=None)
  return found


class _Program:
  """Counts what computations do."""

  def __init__(self, known: dict[str, Computation]):
    self.known = known

  def run(self, name: str) -> Schedule:
    """What one run of a computation does."""
    return _sum([self._does(self.known[name], found) for found in self.known[name].values()])

  def _does(self, around: Computation, found: Instruction) -> Schedule:
    """What one instruction of a computation does."""
    if found.op == 'while':
      rounds = _Loop(self.known, around, found).rounds()
      each = self.run(found.computation('body'))
      return Schedule(*(rounds * count for count in dataclasses.astuple(each)))
    if found.op == 'conditional':
      return max(map(self.run, _branches(found)), key=_time)
    if found.op == 'call':
      return self.run(found.computation('to_apply'))
    if found.op == 'async-start':
      return self.run(found.computation('calls'))
    if found.op in _FREE:
      return _NOTHING
    kernels = float(any(f'custom_call_target="{name}"' in found.rest for name in _KERNELS))
    estimated = _CYCLES.search(found.rest)
    cycles = float(estimated[1]) if estimated else 0.0
    products = cycles if self._multiplies(found) else 0.0
    return Schedule(cycles, products, self._moved(around, found), kernels)

  def _multiplies(self, found: Instruction) -> bool:
    """Whether an instruction is a product, or has one fused into it."""
    if found.op != 'fusion':
      return found.op in ('dot', 'convolution')
    return any(map(self._multiplies, self.known[found.computation('calls')].values()))

  def _moved(self, around: Computation, found: Instruction) -> float:
    """Bytes that an instruction reads and writes in the device's memory."""
    given = [around[name] for name in found.operands if name in around]
    if found.op in ('copy-start', 'slice-start'):  # of one end, what moves, a mark
      end, (moved, is_far), *_ = found.parts
      return moved * (is_far + end[1])
    if found.op in _PART:
      return _in_memory(found.size, given[0]) + found.far
    if found.op == 'dynamic-update-slice':
      return given[1].far + _in_memory(given[1].size, found)
    if found.op != 'fusion':
      return found.far + sum(value.far for value in given)
    inner = found.computation('calls')
    reads = sum(_in_memory(self._read(inner, i), value) for i, value in enumerate(given))
    writes = zip(self._written(inner), found.parts, strict=True)
    return reads + sum(size for size, (_, is_far) in writes if is_far)

  def _read(self, name: str, index: int) -> float:
    """Bytes that a fused computation reads of its parameter: of one that it cuts, the pieces."""
    (parameter,) = (
      found
      for found in self.known[name].values()
      if found.op == 'parameter' and found.operands == (f'{index}',)
    )
    needed = 0.0
    for user, place in self._users(name, parameter.name):
      if user.op in _PART and place == 0:
        needed += user.size
      elif user.op == 'fusion':
        needed += self._read(user.computation('calls'), place)
      elif user.op != 'dynamic-update-slice' or place:  # a slice is written into its place
        return parameter.size
    return min(needed, parameter.size)

  def _users(self, name: str, value: str) -> Iterator[tuple[Instruction, int]]:
    """(who reads a value, in which place), through what only renames it."""
    for user in self.known[name].values():
      for place, operand in enumerate(user.operands):
        if operand != value:
          continue
        if user.op == 'bitcast':
          yield from self._users(name, user.name)
        elif user.op != 'tuple':
          yield user, place

  def _written(self, name: str) -> list[float]:
    """Bytes that a fused computation writes of each result: of one changed in place, the slice."""
    body = self.known[name]
    root = root_of(body)
    results = [root]
    if root.op == 'tuple':
      results = [body[operand] for operand in root.operands]
    written = []
    for result in results:
      while result.op == 'bitcast':
        result = body[result.operands[0]]
      if result.op == 'dynamic-update-slice':
        written.append(body[result.operands[1]].size)
      elif result.op == 'fusion':
        written += self._written(result.computation('calls'))
      else:
        written += [size for size, _ in result.parts]
    return written


class _Loop:
  """A loop with a counter, as a scan is compiled.

  Attributes:
    known: all computations.
    around: the one that the loop is in.
    loop: the instruction.
  """

  def __init__(self, known: dict[str, Computation], around: Computation, loop: Instruction):
    self.known = known
    self.around = around
    self.loop = loop

  def rounds(self) -> int:
    """How often it runs: as the compiler says, or by the counter's start, step and end.

    Raises:
      Unreadable: they are not constants.
    """
    told = _TRIPS.search(self.loop.rest)
    if told:
      return int(told[1])
    condition = self.known[self.loop.computation('condition')]
    counter, end = self._compared(condition)
    start = _constant(self.around, self._first(counter))
    if end.op == 'get-tuple-element':
      last = _constant(self.around, self._first(end))
    else:
      last = _constant(condition, end)
    return max(0, math.ceil((last - start) / self._step(counter)))

  def _compared(self, condition: Computation) -> tuple[Instruction, Instruction]:
    """(the counter, what it stays below)."""
    test = root_of(condition)
    sides = test.operands
    if test.op == 'fusion':  # which has the comparison alone
      inner = self.known[test.computation('calls')]
      test = root_of(inner)
      sides = [sides[int(inner[name].operands[0])] for name in test.operands]
    if test.op != 'compare' or 'direction=LT' not in test.rest:
      raise Unreadable(f'{self.loop.name} ends by {test.op}')
    counter, end = (condition[name] for name in sides)
    return counter, end

  def _first(self, read: Instruction) -> Instruction:
    """What the loop begins with, where a get-tuple-element reads."""
    return _entry(self.around, self.around[self.loop.operands[0]], read)

  def _step(self, counter: Instruction) -> int:
    """What a round adds to the counter."""
    body = self.known[self.loop.computation('body')]
    added = _entry(body, root_of(body), counter)
    if added.op == 'fusion':
      body = self.known[added.computation('calls')]
      added = root_of(body)
    if added.op == 'add':
      for name in added.operands:
        if body[name].op == 'constant':
          return _constant(body, body[name])
    raise Unreadable(f'{self.loop.name} counts by {added.op}')


def _entry(around: Computation, made: Instruction, read: Instruction) -> Instruction:
  """What stands in a tuple where a get-tuple-element reads."""
  if made.op != 'tuple':
    raise Unreadable(f'a loop carries {made.op}')
  return around[made.operands[int(read.attribute(r'index=(\d+)'))]]


def _constant(around: Computation, found: Instruction) -> int:
  """The value of an integer, through copies of it."""
  while found.op in ('copy', 'copy-done', 'copy-start', 'bitcast'):
    found = around[found.operands[0]]
  if found.op != 'constant':
    raise Unreadable(f'{found.op} is no constant')
  return int(found.operands[0])


def _branches(found: Instruction) -> list[str]:
  if 'branch_computations' in found.rest:
    return found.computations('branch_computations')
  return [found.computation(f'{way}_computation') for way in ('true', 'false')]


def _time(found: Schedule) -> tuple[float, float]:
  return found.cycles, found.moved


def _sum(parts: list[Schedule]) -> Schedule:
  if not parts:
    return _NOTHING
  return Schedule(*map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))


def _in_memory(size: float, value: Instruction) -> float:
  """Bytes of a part of a value, 0 if that is on the chip."""
  return size if value.far else 0.0


_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_KERNELS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'triton_kernel_call')
_NOTHING = Schedule(0.0, 0.0, 0.0, 0.0)
# What runs nothing by itself, or ends what was begun elsewhere.
_FREE = {
  'after-all',
  'async-done',
  'async-update',
  'bitcast',
  'constant',
  'copy-done',
  'get-tuple-element',
  'parameter',
  'partition-id',
  'replica-id',
  'slice-done',
  'tuple',
}
_PART = {'dynamic-slice', 'slice', 'gather'}
