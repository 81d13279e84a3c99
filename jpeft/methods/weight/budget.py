"""What a budget of trained numbers is spent on, from the most sensitive numbers: see `spt`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jpeft.core import Found

from ..ragged import Live

# A kernel is tuned whole from a tenth of the cost on, a vector from a fifth of its length on.
ALPHA = 10
SHARE = 5
STRUCTURES = ('lora', 'adapter')

# (fan_in, fan_out) of a kernel, (length,) of a vector.
Shape = tuple[int, ...]


class Allocation(NamedTuple):
  """What is trained of some tensors.

  Attributes:
    kinds: of each tensor 'structured', 'entries', 'vector', or None where nothing is.
    total: trained numbers.
  """

  kinds: list[str | None]
  total: int


class Plan(NamedTuple):
  """The allocation that is closest to a budget.

  Attributes:
    tau: how many numbers were taken for sensitive.
    kinds, total: see `Allocation`.
  """

  tau: int
  kinds: list[str | None]
  total: int


def cost(shape: Shape, structured: str, rank: int) -> int:
  """Numbers of a kernel that is tuned whole."""
  fan_in, fan_out = shape
  if structured == 'adapter':
    return 2 * fan_out * rank + rank + fan_out
  return rank * (fan_in + fan_out)


def allocated(
  counts: np.ndarray, shapes: Sequence[Shape], structured: str, rank: int
) -> Allocation:
  """What is trained of tensors that have so many sensitive numbers."""
  kinds: list[str | None] = []
  total = 0
  for count, shape in zip(counts.tolist(), shapes, strict=True):
    kind = None
    if len(shape) == 1:
      if count * SHARE >= shape[0]:
        kind = 'vector'
        total += shape[0]
    elif count:
      whole = cost(shape, structured, rank)
      kind = 'structured' if count * ALPHA >= whole else 'entries'
      total += whole if kind == 'structured' else count
    kinds.append(kind)
  return Allocation(kinds, total)


def closest(
  tensor: np.ndarray,
  shapes: Sequence[Shape],
  budget: int,
  allocate: Callable[[np.ndarray, Sequence[Shape]], Allocation],
  step: int,
  steps: int,
) -> Plan:
  """The plan whose total is closest to a budget; of two as close that of fewer sensitive numbers.

  Args:
    tensor: for each sensitive number, the most sensitive first, the tensor that it is in.
    shapes: of all tensors.
    budget: of trained numbers.
    allocate: (counts, shapes) -> Allocation.
    step: tau is step, 2 step, ... up to all sensitive numbers.
    steps: how many of these there are at most.
  """
  plans = []
  for tau in range(step, step * steps + 1, step):
    tau = min(tau, len(tensor))
    counts = np.bincount(tensor[:tau], minlength=len(shapes))
    plans.append(Plan(tau, *allocate(counts, shapes)))
    if tau == len(tensor):
      break
  return min(plans, key=lambda plan: abs(plan.total - budget))


@dataclasses.dataclass(frozen=True)
class Chosen:
  """What the pass found, by kind, path and array.

  Attributes:
    entries: {(path, array): [c, 3], layer, row and column of each entry}.
    structured, vector: {(path, array): the layers that are tuned whole}.
    token: (path, array) of class tokens.
    layers: {path of a stacked site: its number of layers}.
  """

  entries: Mapping[tuple[str, str], np.ndarray]
  structured: Mapping[tuple[str, str], np.ndarray]
  vector: Mapping[tuple[str, str], np.ndarray]
  token: Mapping[tuple[str, str], np.ndarray]
  layers: Mapping[str, int]

  @classmethod
  def of(cls, found: Found) -> 'Chosen':
    kinds: dict[str, dict] = {'entries': {}, 'structured': {}, 'vector': {}, 'token': {}}
    layers = {}
    for key, x in found.items():
      kind, _, place = key.partition(' ')
      if kind == 'layers':
        layers[place] = int(x)
      elif kind in kinds:
        path, _, array = place.rpartition(' ')
        kinds[kind][path, array] = x
    return cls(**kinds, layers=layers)

  def kernels(self, with_structured: bool) -> list[tuple[str, str]]:
    """(path, array) of the kernels that `_Kernels` changes."""
    return list(dict.fromkeys([*self.entries, *(self.structured if with_structured else ())]))

  def stacks(self, per_place: Mapping[tuple[str, str], Live]) -> dict[str, Live]:
    """`live` of `ragged`, from that of each array of the sites in stacks."""
    live: dict[str, dict] = {}
    for (path, array), own in per_place.items():
      if path in self.layers:
        live.setdefault(path, {}).update({f'{array}/{key}': x for key, x in own.items()})
    return live
