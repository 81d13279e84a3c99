"""What the devices of a mesh send each other in a step."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jpeft import programs


class Traffic(NamedTuple):
  """The collectives of one kind along the same axes of the mesh.

  Attributes:
    kind: such as 'all-gather'.
    axes: of the mesh.
    in_layers: whether they are in a loop, as those of a scanned stack of layers are.
    count: how many a step makes.
    bytes: of their arrays, on one device.
  """

  kind: str
  axes: tuple[str, ...]
  in_layers: bool
  count: int
  bytes: int

  def __str__(self) -> str:
    where = ' in loops' if self.in_layers else ''
    return (
      f'{self.count:,} {self.kind} over {" x ".join(self.axes)}{where}, {programs.mib(self.bytes)}'
    )

  def row(self) -> dict[str, Any]:
    """As JSON: sizes in MiB."""
    return {
      'kind': self.kind,
      'axes': list(self.axes),
      'in_layers': self.in_layers,
      'count': self.count,
      'mib': round(self.bytes / 2**20, 3),
    }


def traffic_of(collectives: Iterable[programs.Collective]) -> tuple[Traffic, ...]:
  """The collectives of a step, by kind and axes, those that move most first."""
  found: dict[tuple, list[int]] = {}
  for one in collectives:
    if not one.axes:
      continue
    sums = found.setdefault((one.kind, one.axes, one.loops > 0), [0, 0])
    sums[0] += one.rounds
    sums[1] += one.rounds * one.bytes
  made = [Traffic(*key, *sums) for key, sums in found.items()]
  return tuple(sorted(made, key=lambda one: -one.bytes))
