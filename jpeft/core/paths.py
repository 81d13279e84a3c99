"""Paths of modules and arrays, and the names of what jpeft stores beside them."""

import re

RIDER, TAP = 'jpeft', 'jpeft_tap'


def join_path(*parts: str) -> str:
  """The parts of a path that are not empty, joined by '/'."""
  return '/'.join(p for p in parts if p)


def natural(path: str) -> list[tuple[int, str]]:
  """A sort key that puts block_10 after block_9."""
  return [(int(t), '') if t.isdigit() else (-1, t) for t in re.split(r'(\d+)', path)]
