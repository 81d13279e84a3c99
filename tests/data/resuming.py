"""Batches that go on from a place in the middle of a pass."""

import numpy as np


def check_goes_on(batches, count):
  """New batches that take up the state of others after `count` of them give the same next one.

  Args:
    batches: () -> new `Batches`.
    count: how many the first ones give before.
  """
  first = batches()
  for _ in range(count):
    next(first)
  again = batches()
  again.restore(first.state())
  one, other = next(first), next(again)
  for name, x in one.items():
    np.testing.assert_array_equal(x, other[name])
