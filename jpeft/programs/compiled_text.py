"""The text of a compiled program: its computations, their instructions, and how often they run.

Whatever is read off a compiled program beyond XLA's own analysis (which counts the body of a loop
once) is read here: cycles and moved bytes (`schedule`) and what devices send each other
(`collectives`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Unreadable(ValueError):
  """A program that is written in another way than is known here."""


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    name: of its result.
    parts: of the result, one or those of a tuple: (bytes, whether they are in the device's memory
      and not on the chip).
    op: what it does, such as 'fusion'.
    operands: names of what it reads; of a constant or a parameter what stands in their place.
    rest: its attributes as text.
    root: whether the computation returns it.
    text: its line.
  """

  name: str
  parts: tuple[tuple[float, bool], ...]
  op: str
  operands: tuple[str, ...]
  rest: str
  root: bool
  text: str

  @property
  def size(self) -> float:
    """Bytes of its result."""
    return sum(size for size, _ in self.parts)

  @property
  def far(self) -> float:
    """Those in the device's memory."""
    return sum(size for size, is_far in self.parts if is_far)

  def attribute(self, pattern: str) -> str:
    """The group of a pattern among the attributes.

    Raises:
      Unreadable: there is none.
    """
    found = re.search(pattern, self.rest)
    if found is None:
      raise Unreadable(f'{self.op} {self.name} has no {pattern}')
    return found[1]

  def computation(self, kind: str) -> str:
    """The name of the computation that an attribute such as 'body' gives."""
    return self.attribute(rf'\b{kind}=%?([\w.\-]+)')

  def branches(self) -> list[str]:
    """The names of the computations that a conditional chooses from."""
    if 'branch_computations' in self.rest:
      return re.findall(r'[\w.\-]+', self.attribute(r'\bbranch_computations=\{([^}]*)\}'))
    return [self.computation(f'{way}_computation') for way in ('true', 'false')]

  def bodies(self) -> list[str]:
    """The names of the computations that run in place of it; of a conditional one of them does."""
    if self.op == 'while':
      return [self.computation('body')]
    if self.op == 'conditional':
      return self.branches()
    if self.op == 'call':
      return [self.computation('to_apply')]
    if self.op == 'async-start':
      return [self.computation('calls')]
    return []

  def named(self) -> list[str]:
    """The names of all computations that it uses."""
    found = _NAMED.findall(self.rest)
    if 'branch_computations' in self.rest:
      found += self.branches()
    return found


Computation = dict[str, Instruction]


class Run(NamedTuple):
  """One place from which a computation is run.

  Attributes:
    name: of the computation.
    rounds: how often a call of the program runs it from there.
    loops: how many loops it is in.
    part: whether it is a part of one operation, such as a fusion, or the end of a loop.
  """

  name: str
  rounds: int
  loops: int
  part: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    computations: {name: {name: instruction}}, those that are called before those that call them.
    entry: the name of the computation that the program begins with.
  """

  computations: dict[str, Computation]
  entry: str

  def rounds(self, around: Computation, loop: Instruction) -> int:
    """How often a loop runs its body: as the compiler says, or by the counter of a scan.

    Args:
      around: the computation that the loop is in.
      loop: an instruction.

    Raises:
      ValueError, LookupError: it counts in another way than is known here, or by no constants.
    """
    told = _TRIPS.search(loop.rest)
    if told:
      return int(told[1])
    return _Counter(self, around, loop).rounds()

  def probable_rounds(self, around: Computation, loop: Instruction) -> int:
    """The same; else the one integer that its condition has, else 1."""
    try:
      return self.rounds(around, loop)
    except (ValueError, LookupError):
      condition = self.computations.get(loop.computation('condition'), {})
      limits = [found for found in condition.values() if _is_integer(found)]
      if len(limits) != 1:
        return 1
      return int(limits[0].operands[0])

  def runs(self) -> Iterator[Run]:
    """Each place from which a computation is run, the entry first; by `probable_rounds`."""
    return self._runs(Run(self.entry, 1, 0, False))

  def _runs(self, run: Run) -> Iterator[Run]:
    yield run
    around = self.computations.get(run.name, {})
    for found in around.values():
      rounds, loops = run.rounds, run.loops
      if found.op == 'while':
        rounds *= self.probable_rounds(around, found)
        loops += 1
      bodies = found.bodies()
      for name in found.named():
        yield from self._runs(Run(name, rounds, loops, run.part or name not in bodies))


def parsed(text: str) -> Program:
  """The program that a text is of.

  Raises:
    Unreadable: an instruction is written in another way than is known here.
  """
  found: dict[str, Computation] = {}
  entry = ''
  current: Computation = {}
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      current = found[head[2]] = {}
      if head[1]:
        entry = head[2]
    elif line.startswith(' ') and (written := _LINE.match(line)):
      instruction = _instruction(*written.groups(), line)
      current[instruction.name] = instruction
  return Program(found, entry)


def root_of(computation: Computation) -> Instruction:
  """What a computation returns."""
  for instruction in computation.values():
    if instruction.root:
      return instruction
  raise Unreadable('a computation returns nothing')


# ---- Loops.


@dataclasses.dataclass(frozen=True)
class _Counter:
  """The counter of a loop, as a scan is compiled.

  Attributes:
    program: all computations.
    around: the one that the loop is in.
    loop: the instruction.
  """

  program: Program
  around: Computation
  loop: Instruction

  def rounds(self) -> int:
    """By the counter's start, step and end.

    Raises:
      Unreadable: they are not constants.
    """
    condition = self.program.computations[self.loop.computation('condition')]
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
      inner = self.program.computations[test.computation('calls')]
      test = root_of(inner)
      sides = tuple(sides[int(inner[name].operands[0])] for name in test.operands)
    if test.op != 'compare' or 'direction=LT' not in test.rest:
      raise Unreadable(f'{self.loop.name} ends by {test.op}')
    counter, end = (condition[name] for name in sides)
    return counter, end

  def _first(self, read: Instruction) -> Instruction:
    """What the loop begins with, where a get-tuple-element reads."""
    return _entry(self.around, self.around[self.loop.operands[0]], read)

  def _step(self, counter: Instruction) -> int:
    """What a round adds to the counter."""
    body = self.program.computations[self.loop.computation('body')]
    added = _entry(body, root_of(body), counter)
    if added.op == 'fusion':
      body = self.program.computations[added.computation('calls')]
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


def _is_integer(found: Instruction) -> bool:
  """Whether an instruction is a constant of 32 bits that could be an end."""
  return found.op == 'constant' and found.size == 4 and found.operands[0].isdigit()


# ---- Lines.


def _instruction(root: str | None, name: str, rest: str, text: str) -> Instruction:
  end = _closed(rest) if rest.startswith('(') else rest.find(' ')
  kind = rest[:end]
  op, _, _ = rest[end:].lstrip().partition('(')
  given = rest[end:].lstrip()[len(op) :]
  end = _closed(given)
  inside = given[1 : end - 1]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  if op in ('constant', 'parameter'):
    operands = (inside,)
  return Instruction(name, _parts(kind), op, operands, given[end:], bool(root), text)


def _closed(text: str) -> int:
  """The place after the bracket that closes the first one."""
  depth = 0
  for found in re.finditer(r'[()]', text):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  raise Unreadable(f'a bracket stays open in {text[:80]!r}')


def _parts(kind: str) -> tuple[tuple[float, bool], ...]:
  """The parts of a type, such as bf16[3,768]{1,0:S(1)} or a tuple of them; S(n) is on the chip."""
  parts = []
  for dtype, sizes, layout in _TYPE.findall(kind):
    count = math.prod(int(size.strip('<=')) for size in sizes.split(',') if size)
    parts.append((count * _bytes(dtype), 'S(' not in layout))
  return tuple(parts)


def _bytes(dtype: str) -> float:
  if dtype == 'pred':
    return 1
  bits = re.match(r'[a-z]+(\d+)', dtype)
  return int(bits[1]) / 8 if bits else 0


_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'\s+(ROOT )?%([\w.\-]+) = (.*)$')
_TYPE = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAMED = re.compile(r'\b(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)')
