"""The largest batch that fits, and what might fit instead."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jpeft.core import Tuned

from .devices import Target
from .measure import measure
from .result import Plan, Plans
from .work import Work

# Methods that are tried, in this order, if nothing fits.
INSTEAD = ('lst', 'linear')
# Steps of a search for the largest batch by the line of its bytes; those after them halve.
_GUESSES = 6


class Tried(NamedTuple):
  """A batch whose step was compiled.

  Attributes:
    size: examples.
    fits: whether the device has room for it.
    total: bytes that it asks for; at least so many where it was not compiled to the end.
  """

  size: int
  fits: bool
  total: int


def largest(
  tried: Callable[[int], Tried],
  start: int,
  limit: int,
  fixed: int,
  unit: int = 1,
  most: int = 2**20,
) -> int:
  """The largest multiple of `unit` that fits, to an eighth; 0 if not even `unit` does.

  The bytes of a step are close to a line over the size of its batch. So the next size is where the
  line through two sizes meets the limit, and then a size an eighth from there; a step costs seconds
  to compile.

  Args:
    tried: compiles a step for a size; sizes above one that does not fit do not fit either.
    start: the first size to try.
    limit: bytes of the device.
    fixed: bytes of a step without examples, about.
    unit: sizes are its multiples.
    most: no size above it is tried.
  """
  low = 0  # fits
  high = None  # does not fit; unknown at first
  known = [Tried(0, True, fixed)]
  size = max(unit, start // unit * unit)
  most = max(size, most // unit * unit)
  while True:
    known.append(tried(size))
    if known[-1].fits:
      low = size
    else:
      high = size
    step = max(unit, low // 8 // unit * unit)
    if low == most or (high is not None and high - low <= step):
      return low
    size = int(_next(known, low, high, limit, step)) // unit * unit
    size = min(max(size, low + unit), most)
    if high is not None:
      size = min(size, high - unit)


def _next(known: Sequence[Tried], low: int, high: int | None, limit: int, step: int) -> float:
  """A size between `low` and `high` to try."""
  if len(known) > _GUESSES:  # no line, for instance since the compiler recomputes what is short
    return 2 * low if high is None else (low + high) / 2
  end = _on_the_line(known[-2:], limit)
  if end < low + step:  # one more try shows that the end is here
    return low + step
  if high is not None and end > high - step:
    return high - step
  # A little below: where memory is short the compiler searches for long what it could recompute.
  return end * 31 / 32


def _on_the_line(two: Sequence[Tried], limit: int) -> float:
  """The size at which the line through two tries meets the limit."""
  first, second = two
  slope = (second.total - first.total) / (second.size - first.size)
  if slope <= 0:
    return 2 * second.size
  return second.size + (limit - second.total) / slope


def planned(
  work: Work, name: str, tuned: Tuned, optimizer: Callable, where: Target, search: bool
) -> Plan:
  """The plan at the batch of the work and, if `search`, the largest batch."""
  first = measure(work, name, tuned, optimizer, where)
  if not search or first.limit is None:
    return first

  def tried(size: int) -> Tried:
    plan = first
    if size != work.size:
      plan = measure(work, name, tuned, optimizer, where, size)
    return Tried(size, plan.fits, plan.total)

  unit = work.mesh[0] * work.accumulate
  fixed = first.weights + first.theta + first.optimizer
  found = largest(tried, work.size, first.limit, fixed, unit)
  return dataclasses.replace(first, largest=found)


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
