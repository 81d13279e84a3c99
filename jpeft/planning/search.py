"""The largest batch that fits, and what might fit instead."""

import dataclasses
from collections.abc import Callable

from jpeft.core import Tuned

from .devices import Target
from .measure import measure
from .result import Plan, Plans
from .work import Work

# Methods that are tried, in this order, if nothing fits.
INSTEAD = ('lst', 'linear')


def largest(fits: Callable[[int], bool], start: int, unit: int = 1, most: int = 2**20) -> int:
  """The largest multiple of `unit` that fits, to an eighth; 0 if not even `unit` does.

  Args:
    fits: whether a size fits; sizes above one that does not fit do not fit either.
    start: the first size to try.
    unit: sizes are its multiples.
    most: no size above it is tried.
  """
  low = 0  # fits
  high = None  # does not fit; unknown at first
  size = max(unit, start // unit * unit)
  while True:
    if fits(size):
      low = size
    else:
      high = size
    if high is None:
      if 2 * low > most:
        return low
      size = 2 * low
    elif high - low <= max(unit, low // 8):
      return low
    else:
      middle = (low + high) // 2 // unit * unit
      size = max(middle, low + unit)


def planned(
  work: Work, name: str, tuned: Tuned, optimizer: Callable, where: Target, search: bool
) -> Plan:
  """The plan at the batch of the work and, if `search`, the largest batch."""
  first = measure(work, name, tuned, optimizer, where)
  if not search or first.limit is None:
    return first

  def fits(size: int) -> bool:
    if size == work.size:
      return first.fits
    return measure(work, name, tuned, optimizer, where, size).fits

  unit = work.mesh[0] * work.accumulate
  return dataclasses.replace(first, largest=largest(fits, work.size, unit))


def or_instead(plans: list[Plan], planned: Callable[[str], Plan]) -> Plans:
  """The plans and, if none fits, those of INSTEAD up to the first that does.

  Args:
    plans: of the methods that were asked for.
    planned: method name -> its plan.
  """
  plans = list(plans)
  for name in INSTEAD:
    if any(plan.fits is not False for plan in plans):
      break
    if name not in [plan.method for plan in plans]:
      plans.append(planned(name))
  return Plans(plans)
