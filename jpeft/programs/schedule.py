"""What a compiled program takes of its device's time, with every round of its loops.

Read from the text of the program: the estimate of cycles that the compiler of TPUs writes beside
each operation, and the bytes that are read and written. XLA's analysis of costs counts the body of
a loop once, gives no cycles, and counts what stays on the chip.
"""

import dataclasses
import re
from collections.abc import Iterator

import jax

from .compiled_text import Computation, Instruction, Program, parsed, root_of


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
    program = parsed(text)
    found = _Counted(program).run(program.entry)
  except (ValueError, LookupError):  # written in a way that is not known here
    return None
  if 'estimated_cycles' not in text:
    return dataclasses.replace(found, cycles=None)
  return found


class _Counted:
  """Counts what computations do."""

  def __init__(self, program: Program):
    self.program = program
    self.known = program.computations

  def run(self, name: str) -> Schedule:
    """What one run of a computation does."""
    return _sum([self._does(self.known[name], found) for found in self.known[name].values()])

  def _does(self, around: Computation, found: Instruction) -> Schedule:
    """What one instruction of a computation does."""
    inside = [self.run(name) for name in found.bodies()]
    if found.op == 'while':
      rounds = self.program.rounds(around, found)
      return Schedule(*(rounds * count for count in dataclasses.astuple(inside[0])))
    if inside:  # a call, or branches, of which the longest counts
      return max(inside, key=_time)
    if found.op in _FREE:
      return _NOTHING
    kernels = float(any(f'custom_call_target="{name}"' in found.rest for name in _KERNELS))
    cycles = _cycles(found)
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


def _cycles(found: Instruction) -> float:
  """The compiler's estimate of one run of an instruction; 0 where there is none."""
  estimated = _CYCLES.search(found.rest)
  return float(estimated[1]) if estimated else 0.0


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
