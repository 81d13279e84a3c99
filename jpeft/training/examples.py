"""The examples of a run: which are skipped, and whether they are those that it was begun with.

run.json has a digest of each split: the number of its examples, and a SHA-256 of what is in them.
Of up to ROWS examples and about BYTES bytes all are read. Of more, a choice is read that the number
of examples fixes: a change of all of them is always found, a change of few may not be.
"""

import hashlib
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jpeft import data, jsonfiles

ROWS = 10_000
BYTES = 2**25  # of their content; of pixels, not of files
LEAST = 16  # examples that are read however large they are
# What run.json has of them.
_SPLIT = {'examples': int, 'unreadable': [int], 'sha256': (str, None)}
_KEPT = {'data?': {str: _SPLIT}}


# ---- What is skipped.


def skipped_of(config, tell: Callable[[str], None]) -> dict[str, data.Skipped]:
  """{'train' or 'test': the skipped examples of that split}; empty where none is to be skipped."""
  if config.data.on_error != 'skip':
    return {}
  splits = {'train': config.data.train, 'test': config.data.test}
  return {role: data.Skipped(split, tell) for role, split in splits.items()}


def restore_skipped(skipped: Mapping[str, data.Skipped], state: Mapping[str, Any]) -> None:
  """Takes in what a checkpoint has of them; one of a run that skipped none has nothing."""
  for role, found in skipped.items():
    if role in state:
      found.restore(state[role])


def count_of(skipped: Mapping[str, data.Skipped], role: str) -> dict[str, int]:
  """What a line of metrics.jsonl has of skipped examples; nothing where none is to be skipped."""
  if role not in skipped:
    return {}
  return {'skipped': len(skipped[role])}


def listed(skipped: Mapping[str, Mapping[str, Any]]) -> str:
  """What a report says of them, from `Skipped.report` of each split."""
  told = []
  for found in skipped.values():
    why = '; '.join(f'{row}: {reason}' for row, reason in found['why'].items())
    told.append(f'{found["examples"]:,} of {found["split"]!r} ({why})')
  return ', '.join(told)


# ---- Digests.


def digests(
  folder: pathlib.Path, sources: Mapping[str, Any], on_error: str
) -> dict[str, dict[str, Any]]:
  """{split: its digest}, to be compared by `check_same`.

  A run that stops at a broken example may go on when that has been mended: what could not be read
  when it was begun is left out. A run that skips examples has skipped it, and may not.

  Args:
    folder: of the run; what it has of its beginning says what is left out.
    sources: {split: its examples}.
    on_error: of the config.
  """
  kept = _kept(folder)
  found = {}
  for split, source in sources.items():
    without = ()
    if on_error == 'raise':
      without = kept.get(split, {}).get('unreadable', ())
    found[split] = digest(source, without)
  return found


def check_same(folder: pathlib.Path, found: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises a ValueError if digests are not those of run.json; older runs have none."""
  for split, before in _kept(folder).items():
    now = found[split]
    if before['examples'] != now['examples']:
      raise ValueError(
        f'{folder} was begun with other data: {split!r} had {before["examples"]:,} examples, and '
        f'has {now["examples"]:,} now; put the data back, or choose another --workdir'
      )
    broken = sorted({*now['unreadable']} - {*before['unreadable']})
    if broken:
      raise ValueError(
        f'{folder} was begun with other data: example {broken[0]} of {split!r} could be read then, '
        'and cannot be read now; put the data back, or choose another --workdir'
      )
    if before['sha256'] != now['sha256']:
      raise ValueError(
        f'{folder} was begun with other data: examples of {split!r} have changed since; put the '
        'data back, or choose another --workdir'
      )


def _kept(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  file = folder / 'run.json'
  if not file.exists():
    return {}
  return jsonfiles.read(file, _KEPT).get('data', {})


def digest(source, without: Collection[int] = ()) -> dict[str, Any]:
  """What is compared of a split.

  Args:
    source: len and [i] -> example.
    without: examples that are counted, and not read.

  Returns:
    'examples': their number. 'unreadable': numbers of those that were looked at and raised, those
    of `without` among them. 'sha256': of the content of the others; None of a source that gives
    another content each time.
  """
  first = [row for row in _drawn(len(source), LEAST) if row not in without]
  known = {row: _content(source, row) for row in first}
  whole = {row: content for row, content in known.items() if content is not None}
  again = next(iter(whole), None)
  if again is not None and whole[again] != _content(source, again):
    return {'examples': len(source), 'unreadable': [], 'sha256': None}
  size = sum(content.size for content in whole.values()) / max(len(whole), 1)
  rows = _drawn(len(source), max(LEAST, int(min(ROWS, BYTES / max(size, 1)))))
  hashed = hashlib.sha256()
  unreadable = []
  for row in sorted(rows, key=_place(source)):
    if row not in known and row not in without:
      known[row] = _content(source, row)
    content = known.get(row)
    if content is None:
      unreadable.append(row)
      hashed.update(b'unreadable')
    else:
      hashed.update(content.sha256)
  return {
    'examples': len(source),
    'unreadable': sorted(unreadable),
    'sha256': hashed.hexdigest(),
  }


def _drawn(count: int, most: int) -> list[int]:
  """Up to `most` of `count` examples; which these are follows from `count` alone."""
  if count <= ROWS:
    return np.argsort(np.random.Philox(0).random_raw(count), kind='stable')[:most].tolist()
  drawn = np.random.Philox(0).random_raw(most) % np.uint64(count)
  return list(dict.fromkeys(drawn.tolist()))


def _place(source) -> Callable[[int], int]:
  """The key by which examples are read in the order in which they are stored, which is quicker."""
  stored = getattr(source, 'rows', None)
  if stored is None:
    return int
  return stored.__getitem__


class _Content(NamedTuple):
  """What is in an example: the number of its bytes, and their SHA-256."""

  size: int
  sha256: bytes


def _content(source, row: int) -> _Content | None:
  """What is in an example; None if it cannot be read."""
  try:
    example = source[row]
  except data.UNREADABLE:
    return None
  size = 0
  hashed = hashlib.sha256()
  for part in _parts(example):
    size += len(part)
    hashed.update(part)
  return _Content(size, hashed.digest())


def _parts(value: Any) -> Iterator[bytes]:
  """The bytes of a value of an example, piece by piece."""
  if isinstance(value, Mapping):
    yield f'{{{len(value)}'.encode()
    for name in sorted(value, key=str):
      yield from _parts(str(name))
      yield from _parts(value[name])
  elif isinstance(value, (list, tuple)):
    yield f'[{len(value)}'.encode()
    for one in value:
      yield from _parts(one)
  elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
    yield f'{value.dtype}{value.shape}'.encode()
    yield np.ascontiguousarray(value).tobytes()
  elif isinstance(value, bytes):
    yield f'b{len(value)}'.encode()
    yield value
  elif isinstance(value, (str, int, float, bool, type(None))):
    yield repr(value).encode()
  else:
    yield type(value).__name__.encode()  # what it is made of cannot be told in general
