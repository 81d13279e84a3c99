"""What the devices of a mesh send each other in a compiled program, read off its text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Collective(NamedTuple):
  """One instruction that moves arrays between devices.

  Attributes:
    kind: one of KINDS.
    axes: of the mesh, along which devices send.
    bytes: of the arrays as a device has them whole: gathered, or before they are scattered.
    rounds: how often a call of the program runs it.
    loops: how many loops it is in.
    source: the operation that it comes from, as JAX names it.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: int
  rounds: int
  loops: int
  source: str


def collectives(program: jax.stages.Compiled, mesh: Mapping[str, int]) -> list[Collective]:
  """The collectives of a program.

  Args:
    program: compiled for the devices of a mesh.
    mesh: {name: size} of its axes, in their order.
  """
  return collectives_of_text(program.as_text(), mesh)


def collectives_of_text(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """`collectives` of the text of a program.

  Raises:
    ValueError: the devices that an instruction names are not understood.
  """
  bodies = dict(_computations(text))
  runs = _runs(bodies)
  found = []
  for name, lines in bodies.items():
    rounds, loops = runs.get(name, (0, 0))
    for line in lines:
      match = _COLLECTIVE.match(line)
      if match is None or not rounds:
        continue
      kind = match['kind']
      result = match['result']
      if match['start']:
        result = _result_of_done(lines, match['name'])
      size = _nbytes(result)
      groups = _groups(line)
      if kind == 'reduce-scatter':
        size *= len(groups[0])
      if 'all-reduce-scatter' in name:  # fused with the choice of a part
        kind = 'reduce-scatter'
      source = _SOURCE.search(line)
      axes = _axes(groups, mesh)
      found.append(Collective(kind, axes, size, rounds, loops, source[1] if source else ''))
  return found


# ---- The program.

_HEAD = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_COLLECTIVE = re.compile(
  r'\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>.*?) '
  rf'(?P<kind>{"|".join(KINDS)})(?P<start>-start)?\('
)
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_LIMIT = re.compile(r'= s32\[\]\S* constant\((\d+)\)')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  """(name, lines) of the computations, those that are called before those that call them."""
  name = None
  lines: list[str] = []
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head is not None:
      name, lines = head[1], []
    elif line.startswith('}') and name is not None:
      yield name, lines
      name = None
    elif name is not None:
      lines.append(line)


def _runs(bodies: Mapping[str, list[str]]) -> dict[str, tuple[int, int]]:
  """{name of a computation: (how often it runs, in how many loops)}."""
  names = list(bodies)
  found = {names[-1]: (1, 0)}
  for name in reversed(names):
    if name not in found:
      continue
    rounds, loops = found[name]
    for line in bodies[name]:
      is_loop = ' while(' in line
      times = _trips(line, bodies) if is_loop else 1
      for callee in _callees(line):
        before, inside = found.get(callee, (0, 0))
        found[callee] = (before + rounds * times, max(inside, loops + is_loop))
  return found


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
  """How many rounds a loop makes: as the compiler says, else the number that it counts up to."""
  known = _TRIPS.search(line)
  if known is not None:
    return int(known[1])
  condition = _CONDITION.search(line)
  limits = []
  for tested in bodies.get(condition[1], []) if condition else []:
    limits += [int(number) for number in _LIMIT.findall(tested)]
  return max(limits, default=1)


def _callees(line: str) -> list[str]:
  named = _CALLED.findall(line)
  branches = _BRANCHES.search(line)
  if branches is not None:
    named += [name.strip().lstrip('%') for name in branches[1].split(',')]
  return named


def _result_of_done(lines: list[str], start: str) -> str:
  """What an instruction returns that was started by another one."""
  done = re.compile(rf'= (.*?) [\w\-]+-done\(%?{re.escape(start)}\)')
  for line in lines:
    match = done.search(line)
    if match is not None:
      return match[1]
  return ''


def _nbytes(result: str) -> int:
  total = 0
  for kind, bits, shape in _ARRAY.findall(result):
    size = 1 if kind == 'pred' else int(bits) / 8
    total += int(size * math.prod(int(n) for n in shape.split(',') if n))
  return total


# ---- Devices.

_LISTED = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_NAMED = re.compile(
  r'replica_groups=mesh\[(?P<sizes>[^\]]*)\]'
  r'(?:, device_ids=\((?:\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?|(?P<ids>[\d,]+))\))?'
  r' ?\{(?P<along>[^}]*)\}'
)


def _groups(line: str) -> list[list[int]]:
  """The devices that send each other, by their position in the mesh.

  Raises:
    ValueError: they are written in a way that is not known.
  """
  listed = _LISTED.search(line)
  if listed is not None:
    return [_numbers(group) for group in re.findall(r'\{([\d,]*)\}', listed[1])]
  iota = _IOTA.search(line)
  if iota is not None:
    devices = _iota(_numbers(iota[2]))
    if iota[3]:
      devices = devices.transpose(_numbers(iota[3]))
    return devices.reshape(_numbers(iota[1])).tolist()
  named = _NAMED.search(line)
  if named is not None:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named['sizes'])}
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named['along'])]
    devices = _ordered(named, math.prod(sizes.values())).reshape(list(sizes.values()))
    devices = np.moveaxis(devices, along, range(-len(along), 0))
    return devices.reshape(-1, math.prod(devices.shape[-len(along) :])).tolist()
  raise ValueError(f'the devices of this instruction are not understood: {line.strip()[:300]}')


def _ordered(named: re.Match, count: int) -> np.ndarray:
  """The devices of a mesh of the compiler's own, in its order."""
  if named['ids']:
    return np.array(_numbers(named['ids']))
  if not named['dims']:
    return np.arange(count)
  devices = _iota(_numbers(named['dims']))
  if named['order']:
    devices = devices.transpose(_numbers(named['order']))
  return devices


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(',') if number]


def _iota(sizes: list[int]) -> np.ndarray:
  return np.arange(math.prod(sizes)).reshape(sizes)


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The axes of the mesh in which the devices of a group differ."""
  places = np.stack(np.unravel_index(np.array(groups), tuple(mesh.values())), -1)
  differs = (places != places[:, :1]).any((0, 1))
  return tuple(name for name, found in zip(mesh, differs, strict=True) if found)
