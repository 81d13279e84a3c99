"""Parameters of tests that are run in part by default, and in full with `-m slow` besides."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def fast_if(
  fast: Callable[..., bool], cases: Iterable[Any], ids: Callable[..., str] | None = None
) -> list:
  """pytest parameters of the cases, tuples or single values; those that are not `fast` are slow."""
  found = []
  for case in cases:
    values = case if isinstance(case, tuple) else (case,)
    found.append(
      pytest.param(
        *values, marks=[] if fast(*values) else [pytest.mark.slow], id=ids and ids(*values)
      )
    )
  return found
