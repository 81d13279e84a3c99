"""What a budget of trained numbers is spent on, from the most sensitive numbers: see `spt`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

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
