"""Configurations as text for a terminal: what keys there are, and the values of one."""

from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from jpeft.messages import entries

from .load import as_text
from .schema import FIELDS, REQUIRED, flatten

# The heading of the keys that stand in no section.
_RUN = 'run'
_LONGEST = max(map(len, FIELDS))


def reference(width: int = 80) -> str:
  """All keys by section, with what they set and their defaults.

  Args:
    width: of the lines, in characters.
  """
  lines = []
  for section, keys in _sections(FIELDS):
    rows = [(f'{key:{_LONGEST}}', _meaning(key)) for key in keys]
    lines += ['', f'{section}:', *entries(rows, width, margin='  ')]
  return '\n'.join(lines[1:])


def _meaning(key: str) -> str:
  """What a key sets, and its default."""
  field = FIELDS[key]
  if field.default is REQUIRED:
    return f'{field.doc} (required)'
  return f'{field.doc} (default {as_text(field.default)})'


def listing(config: ConfigDict) -> str:
  """All values of a configuration, by section, each as --config.KEY=VALUE takes it."""
  flat = flatten(config)
  others = [key for key in flat if key not in FIELDS]  # those of the method
  lines = []
  for _, keys in _sections([*FIELDS, *others]):
    lines += ['', *(f'{key}={as_text(flat[key])}' for key in keys)]
  return '\n'.join(lines[1:])


def _sections(keys: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
  """(section, its keys), those without a section first."""
  found: dict[str, list[str]] = {_RUN: []}
  for key in keys:
    section, dot, _ = key.partition('.')
    found.setdefault(section if dot else _RUN, []).append(key)
  yield from found.items()
