"""Whose fault it is: exceptions out of a rule say which rule it was, and where."""

import contextlib
from collections.abc import Iterator

from .rules import Rule
from .sites import Site


@contextlib.contextmanager
def blame(rule: Rule, site: Site, what: str) -> Iterator[None]:
  """Adds to an exception which rule raised it, and where.

  Args:
    rule: whose function runs.
    site: where.
    what: the function, such as 'init'.
  """
  try:
    yield
  except Exception as error:
    note = f'in {what} of the rule {rule.name!r} at {site.path or "the model"!r}'
    if note not in getattr(error, '__notes__', ()):
      error.add_note(note)
    raise
