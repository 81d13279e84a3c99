"""Checks of hyperparameters, which factories make before anything else.

Each raises a ValueError that names the method, the hyperparameter and its value, such as "meft:
every=0 must be a whole number, at least 1".
"""

from collections.abc import Iterable
from typing import Any

from jpeft.messages import did_you_mean


def require(met: bool, method: str, name: str, value: Any, rule: str) -> None:
  """Raises ValueError unless a condition is met.

  Args:
    met: the condition.
    method: the name of the factory.
    name: of the hyperparameter.
    value: as it was given.
    rule: how the sentence goes on behind the value, such as "must be 'normal' or 'zero'".
  """
  if not met:
    raise ValueError(f'{method}: {name}={value!r} {rule}')


def choice(method: str, name: str, value: Any, choices: Iterable[Any]) -> None:
  """Raises ValueError unless `value` is one of `choices`; the error lists them."""
  choices = list(choices)
  listed = ', '.join(map(repr, choices))
  hint = did_you_mean(value, map(str, choices))
  require(value in choices, method, name, value, f'is none of {listed}{hint}')


def is_whole(value: float, least: int) -> bool:
  """Whether a number is whole, and not less than `least`."""
  return int(value) == value and value >= least


def whole(method: str, name: str, value: float, least: int) -> None:
  """Raises ValueError unless `value` is a whole number, at least `least`."""
  rule = f'must be a whole number, at least {least}'
  require(is_whole(value, least), method, name, value, rule)


def at_least(method: str, name: str, value: float, least: float) -> None:
  """Raises ValueError unless `value` is at least `least`."""
  require(value >= least, method, name, value, f'must be at least {least}')


def within(method: str, name: str, value: float, low: float, high: float) -> None:
  """Raises ValueError unless low <= value <= high."""
  require(low <= value <= high, method, name, value, f'must lie in [{low}, {high}]')
