"""What may be another one when a run goes on, if the user allows it by `--allow`.

None of it changes what an update computes but by rounding, or else it is the wish itself: more
updates stretch the schedule of the learning rate from there on. Every change is kept in run.json,
and told in the report.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft import config as config_lib
from jpeft.messages import did_you_mean

from .checkpoints import steps_of

HOSTS = 'hosts'
MAY_CHANGE = {
  'mesh': 'devices: the same theta to rounding',
  HOSTS: 'the number of processes: the same theta to rounding',
  'data.name': 'where the same data lie: the path in it',
  'data.dir': 'where the same data lie',
  'model.source': 'where the same weights lie: their SHA-256 is compared',
  'method.start': 'where the same theta lies: its SHA-256 is compared',
  'steps': 'updates of the whole run, at least those that were made',
  'epochs': 'the same in passes over the data',
  'checkpoint': 'when checkpoints are written, and how many are kept',
  'log': 'when lines are written, and where they go',
}
# What is to be done with broken examples may be chosen when the first has been met.
_FREE = ('data.on_error',)
# What run.json and report.json have of each time that something was changed.
CHANGE = {'after': int, 'changed': {str: [object]}}
# The keys by which a run can become longer.
_LENGTHS = ('steps', 'epochs')


def check_allowed(allow: Sequence[str]) -> None:
  """Raises a ValueError for what `--allow` does not take."""
  for name in allow:
    if not _kind(name):
      known = list(MAY_CHANGE)
      raise ValueError(
        f'--allow={name} is none of {", ".join(known)}{did_you_mean(name, known, 0.5)}: anything '
        'else would make another run of it'
      )


def _kind(key: str) -> str | None:
  """The entry of MAY_CHANGE that a key, or a part of it, belongs to."""
  for name in MAY_CHANGE:
    if key == name or key.startswith(f'{name}.'):
      return name
  return None


def changed(ours: Any, theirs: Any, allow: Sequence[str], folder: pathlib.Path) -> dict[str, list]:
  """{dotted key: [before, now]} of what a run goes on with.

  Args:
    ours: the configuration of now.
    theirs: the one that the run was begun with.
    allow: keys, or sections of them.
    folder: of the run, for messages.

  Raises:
    ValueError: something differs that is not allowed, or cannot be.
  """
  found = config_lib.changes(ours, theirs)
  for key in _FREE:
    found.pop(key, None)
  refused = [key for key in found if not any(_covers(name, key) for name in allow)]
  if refused:
    differing = [f'{key} ({found[key][0]!r} here, {found[key][1]!r} there)' for key in refused]
    way = ''
    if all(_kind(key) for key in refused):
      way = f', or --allow={",".join(refused)} to go on with these'
    raise ValueError(
      f'{folder} holds a run with another config: {"; ".join(differing)}. Choose another '
      f'--workdir, or give the same values to go on with that run{way}'
    )
  if 'data.name' in found:
    _check_place(*found['data.name'])
  return {key: [before, now] for key, (now, before) in found.items()}


def _covers(name: str, key: str) -> bool:
  return key == name or key.startswith(f'{name}.')


def _check_place(now: str, before: str) -> None:
  """Raises a ValueError if more of `data.name` differs than the path."""
  if _but_path(now) != _but_path(before):
    raise ValueError(
      f'--allow=data.name lets the same data lie elsewhere: {now!r} differs from {before!r} in '
      'more than the path'
    )


def _but_path(name: str) -> tuple[str, str]:
  """(kind of the source, its options) of a `data.name`; the name itself where it has no path."""
  kind, colon, rest = name.partition(':')
  if not colon:
    return name, ''
  return kind, rest.partition('?')[2]


def is_longer(changes: Mapping[str, Any]) -> bool:
  """Whether a complete run may go on."""
  return any(key in changes for key in _LENGTHS)


def check_length(folder: pathlib.Path, steps: int) -> None:
  """Raises a ValueError if the run in a folder has made more updates than it is to have."""
  made = max(steps_of(folder / 'checkpoints'), default=0)
  if made > steps:
    raise ValueError(f'the run has made {made} updates, and is to have {steps}: give more')


def with_hosts(
  changes: Mapping[str, list], before: int, now: int, allow: Sequence[str], folder: pathlib.Path
) -> dict[str, list]:
  """The changes, with that of the number of processes.

  Raises:
    ValueError: it is another one, and that is not allowed.
  """
  if before == now:
    return dict(changes)
  if HOSTS not in allow:
    raise ValueError(
      f'{folder} was begun by {before} processes, and these are {now}: sums are rounded otherwise; '
      f'--allow={HOSTS} goes on all the same'
    )
  return {**changes, HOSTS: [before, now]}


def recorded(kept: dict, changes: Mapping[str, list], made: int) -> list[dict]:
  """All changes of a run, those of now at the end: {'after': updates, 'changed': changes}.

  Args:
    kept: what run.json says.
    changes: of now.
    made: updates made before.
  """
  found = list(kept.get('changes', ()))
  new = {'after': made, 'changed': json.loads(json.dumps(changes))}
  if changes and new not in found[-1:]:
    found.append(new)
  return found


def line(change: Mapping[str, Any]) -> str:
  """A change on one line."""
  parts = [f'{key} {before} -> {now}' for key, (before, now) in change['changed'].items()]
  return f'changed after {change["after"]} updates: {", ".join(parts)}'
