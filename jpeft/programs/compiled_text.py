"""The text of a compiled program, as instructions of its computations."""

import dataclasses
import math
import re


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
  """

  name: str
  parts: tuple[tuple[float, bool], ...]
  op: str
  operands: tuple[str, ...]
  rest: str
  root: bool

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

  def computations(self, kind: str) -> list[str]:
    """The names of those that an attribute lists, such as 'branch_computations'."""
    return re.findall(r'[\w.\-]+', self.attribute(rf'\b{kind}=\{{([^}}]*)\}}'))


Computation = dict[str, Instruction]


def computations(text: str) -> tuple[dict[str, Computation], str]:
  """({name: {name: instruction}}, the name of the computation that the program begins with)."""
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
      instruction = _instruction(*written.groups())
      current[instruction.name] = instruction
  return found, entry


def root_of(computation: Computation) -> Instruction:
  """What a computation returns."""
  for instruction in computation.values():
    if instruction.root:
      return instruction
  raise Unreadable('a computation returns nothing')


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  end = _closed(rest) if rest.startswith('(') else rest.find(' ')
  kind = rest[:end]
  op, _, _ = rest[end:].lstrip().partition('(')
  given = rest[end:].lstrip()[len(op) :]
  end = _closed(given)
  inside = given[1 : end - 1]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  if op in ('constant', 'parameter'):
    operands = (inside,)
  return Instruction(name, _parts(kind), op, operands, given[end:], bool(root))


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
