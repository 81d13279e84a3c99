"""The largest batch that fits, and what might fit instead."""

import dataclasses
from collections.abc import Callable

from jpeft.core import Tuned

from . import devices as targets
from .measure import measure
from .result import Plan, Plans
from .work import Work

# What is tried, in this order, where nothing that was asked for fits.
INSTEAD = ('lst', 'linear')


def largest(fits: Callable[[int], bool], start: int, unit: int = 1, most: int = 2**20) -> int:
  """The largest multiple of `unit` that fits, to an eighth; 0 where not even `unit` does.

  Args:
    fits: whether a size fits; what is larger than one that does not, does not either.
    start: the first size to try.
    unit: sizes are its multiples.
    most: no size above it is tried.
  """
  low, high, size = 0, None, max(unit, start // unit * unit)
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
      size = (low + high) // 2 // unit * unit
      size = size if size > low else low + unit


def _planned(work: Work, name: str, tuned: Tuned, tx, where: targets.Target, search: bool) -> Plan:
  """The plan at the batch of the work and, if asked for, the largest batch."""
  first = measure(work, name, tuned, tx, where)
  if not search or first.limit is None:
    return first
  fits = lambda size: (
    first.fits if size == work.size else measure(work, name, tuned, tx, where, size).fits
  )
  return dataclasses.replace(
    first, largest=largest(fits, work.size, work.mesh[0] * work.accumulate)
  )


def _or_instead(plans: list[Plan], planned: Callable[[str], Plan]) -> Plans:
  """The plans and, where none fits, those of INSTEAD up to the first that does."""
  for name in INSTEAD:
    if any(p.fits is not False for p in plans):
      break
    if name not in [p.method for p in plans]:
      plans.append(planned(name))
  return Plans(plans)
