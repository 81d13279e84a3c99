"""Rows of measurements in JSON files of docs/, to which runs and machines add in turn."""

import json
import pathlib
from collections.abc import Sequence

from jpeft import jsonfiles
from jpeft.writing import write


def recorded(file: pathlib.Path, default: Sequence[dict] = ()) -> list[dict]:
  """The rows of a file, or the default where there is no file."""
  if not file.exists():
    return list(default)
  return jsonfiles.read(file, [dict])


def record(
  file: pathlib.Path,
  new: Sequence[dict],
  key: Sequence[str],
  default: Sequence[dict] = (),
  drop: Sequence[dict] = (),
) -> list[dict]:
  """Replaces rows by new ones of the same key, adds the others, and writes the file.

  Args:
    file: written as a whole or not at all.
    new: rows.
    key: the names of the entries that identify a row; they also order the rows.
    default: what `recorded` takes.
    drop: recorded rows that are no longer right.

  Returns:
    All rows.
  """
  kept = [row for row in recorded(file, default) if row not in drop]
  table = {tuple(row[name] for name in key): row for row in [*kept, *new]}
  rows = [table[identity] for identity in sorted(table)]
  write(file, json.dumps(rows, indent=1) + '\n')
  return rows
