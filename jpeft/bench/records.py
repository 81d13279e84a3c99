"""Rows of measurements that docs/ keeps as JSON, so that a table can be made in parts and on
several machines.
"""

import json
import pathlib
from collections.abc import Sequence

from jpeft.training import write


def recorded(file: pathlib.Path, default: Sequence[dict] = ()) -> list[dict]:
  """The rows of a file, or the default where there is no file."""
  return json.loads(file.read_text()) if file.exists() else list(default)


def record(
  file: pathlib.Path,
  new: Sequence[dict],
  key: Sequence[str],
  default: Sequence[dict] = (),
  drop: Sequence[dict] = (),
) -> list[dict]:
  """Puts new rows in place of those of the same kind, and the others beside them.

  Args:
    file: written as a whole or not at all.
    new: rows.
    key: the entries of a row that say of what kind it is; they also order the rows.
    default: what `recorded` takes.
    drop: recorded rows that hold no longer.

  Returns:
    All rows.
  """
  table = {
    tuple(row[k] for k in key): row
    for row in [*(r for r in recorded(file, default) if r not in drop), *new]
  }
  rows = [table[kind] for kind in sorted(table)]
  write(file, json.dumps(rows, indent=1) + '\n')
  return rows
