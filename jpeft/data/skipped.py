"""Examples that cannot be read, and are skipped."""

from collections.abc import Callable, Mapping
from typing import Any

UNREADABLE = (ValueError, OSError, RuntimeError)  # what reading a broken example raises
NAMED = 20  # of which it is told and kept why
LONGEST = 300  # characters of that
FARTHEST = 100  # how far from an example that cannot be read the one in its place may be


def first_example(source, skip: bool) -> Any:
  """The first example of a source.

  Args:
    source: len and [i].
    skip: whether the first that can be read will do.

  Raises:
    ValueError, OSError, RuntimeError: it cannot be read, nor can those after it.
  """
  last = min(FARTHEST, len(source)) - 1
  for row in range(last + 1):
    try:
      return source[row]
    except UNREADABLE:
      if not skip or row == last:
        raise
  raise ValueError('the source has no examples')


class Skipped:
  """The examples of a split that could not be read, and why.

  Attributes:
    split: its name.
    tell: called with a sentence for each of the first of them; None for nothing.
  """

  def __init__(self, split: str, tell: Callable[[str], None] | None = None):
    self.split = split
    self.tell = tell
    self._why: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._why)

  def __contains__(self, row: int) -> bool:
    return row in self._why

  def why(self, row: int) -> str:
    """Why an example could not be read."""
    return self._why[row]

  def add(self, failures: Mapping[int, str]) -> None:
    """Takes examples in, {number: why}; those that are there already are not told again."""
    for row, why in failures.items():
      if row in self._why:
        continue
      named = len(self._why) < NAMED
      self._why[row] = why[:LONGEST] if named else ''
      if self.tell is None or not named:
        continue
      self.tell(f'example {row} of {self.split!r} cannot be read and is skipped: {why}')
      if len(self._why) == NAMED:
        self.tell('further ones are only counted')

  def state(self) -> dict[str, Any]:
    """All of them, as a dict for JSON."""
    named = {str(row): why for row, why in self._why.items() if why}
    return {'examples': sorted(self._why), 'why': named}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Takes in what `state` gave, without telling it again."""
    self._why = {row: state['why'].get(str(row), '') for row in state['examples']}

  def report(self) -> dict[str, Any]:
    """How many there are, and the first of them by name."""
    return {'split': self.split, 'examples': len(self), 'why': self.state()['why']}
