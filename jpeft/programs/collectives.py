"""What the devices of a mesh send each other in a compiled program, read off its text."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from .compiled_text import Computation, Instruction, Program, parsed

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
  program = parsed(text)
  runs = _runs(program)
  found = []
  for name, body in program.computations.items():
    if name not in runs:
      continue
    rounds, loops = runs[name]
    for instruction in body.values():
      kind = instruction.op.removesuffix('-start')
      if kind not in KINDS:
        continue
      groups = _groups(instruction.text)
      size = int(_result(body, instruction))
      if kind == 'reduce-scatter':
        size *= len(groups[0])
      if 'all-reduce-scatter' in name:  # fused with the choice of a part
        kind = 'reduce-scatter'
      source = _SOURCE.search(instruction.rest)
      axes = _axes(groups, mesh)
      found.append(Collective(kind, axes, size, rounds, loops, source[1] if source else ''))
  return found


_SOURCE = re.compile(r'op_name="([^"]*)"')


def _runs(program: Program) -> dict[str, tuple[int, int]]:
  """{name of a computation: (how often it runs, in how many loops at most)}."""
  found: dict[str, tuple[int, int]] = {}
  for run in program.runs():
    rounds, loops = found.get(run.name, (0, 0))
    found[run.name] = rounds + run.rounds, max(loops, run.loops)
  return found


def _result(body: Computation, found: Instruction) -> float:
  """Bytes of what a collective returns; of one that is only begun, where it is done."""
  if not found.op.endswith('-start'):
    return found.size
  for other in body.values():
    if other.op.endswith('-done') and found.name in other.operands:
      return other.size
  return 0.0


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
