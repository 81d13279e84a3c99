"""Which axes of a stored array are stacked layers."""

import itertools
from collections.abc import Iterator, Sequence

Shape = tuple[int, ...]


def stack_axes(outer: Sequence[Shape], inner: Sequence[Shape]) -> tuple[int, ...]:
  """The axes that lifting added to the arrays of a module.

  One lift adds the same axis to every array of a module, so the result is what all the arrays
  agree on; where shapes leave a choice, the leading axes, as all practice has it.

  Args:
    outer: the shapes as stored.
    inner: the shapes as the module sees them inside its call, in the same order.

  Returns:
    The axes, counted from the front, or all of them from the back (negative).

  Raises:
    ValueError: no choice of axes explains the shapes.
  """
  agreed: set[tuple[int, ...]] | None = None
  for whole, part in zip(outer, inner, strict=True):
    possible = set(_removals(whole, part))
    if agreed is None:
      agreed = possible
    else:
      agreed &= possible
  if not agreed:
    raise ValueError(f'cannot tell which axes of {list(outer)} are stacked layers of {list(inner)}')
  return min(agreed, key=lambda axes: ([axis < 0 for axis in axes], axes))


def _removals(whole: Shape, part: Shape) -> Iterator[tuple[int, ...]]:
  """Every set of axes whose removal from `whole` leaves `part`, from the front and the back."""
  rank = len(whole)
  for axes in itertools.combinations(range(rank), rank - len(part)):
    rest = tuple(size for axis, size in enumerate(whole) if axis not in axes)
    if rest != tuple(part):
      continue
    yield axes
    if axes:
      yield tuple(axis - rank for axis in axes)
