"""The folder of a run of several processes: process 0 reads and writes it.

Of checkpoints the others write what they hold, if they see the folder.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jpeft import writing

from . import checkpoints, pieces
from .endings import written_together
from .hosts import (
  agreed,
  fetched_by_first,
  first,
  placed,
  sent,
  several,
  together,
  told,
)


@contextlib.contextmanager
def mirrored(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The folder that a process works in: that of the run, or one that is thrown away.

  The second starts with the JSON files of the first and with the names of its checkpoints, so that
  each process finds out the same about the run.
  """
  if not several():
    yield folder
    return
  found = {}
  with together():
    if first():
      found = _described(folder)
  found = told(found)
  if first():
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix='jpeft-') as made:
    own = pathlib.Path(made)
    for name, text in found.items():
      file = own / name
      if text is None:
        file.mkdir(parents=True)
      else:
        file.write_text(text)
    yield own


def seen_by_all(folder: pathlib.Path) -> bool:
  """Whether several processes all see what process 0 writes to a folder, and may write there."""
  if not several():
    return False
  probe = folder / told(f'.seen{writing.PART}{secrets.token_hex(8)}')
  with together():
    if first():
      probe.touch()
  found = agreed(probe.exists() and os.access(folder, os.W_OK))
  if first():
    probe.unlink()
  return found


def _described(folder: pathlib.Path) -> dict[str, str | None]:
  """{name: text} of the JSON files of a run folder; the text of a checkpoint's folder is None."""
  files = [*folder.glob('*.json'), *folder.glob('*.jsonl')]
  found: dict[str, str | None] = {file.name: file.read_text() for file in files}
  for checkpoint in (folder / 'checkpoints').glob('*'):
    if checkpoint.name.isdigit():
      found[f'checkpoints/{checkpoint.name}'] = None
  return found


@contextlib.contextmanager
def console() -> Iterator[Any]:
  """Where lines on the progress of a run go: None, for stderr, but nowhere from other processes."""
  if first():
    yield None
    return
  with open(os.devnull, 'w') as nowhere:
    yield nowhere


def save_theta(path: pathlib.Path, theta: Any, **info) -> None:
  """Writes theta by process 0, see `checkpoints.save_theta`."""
  whole = fetched_by_first(theta)
  with written_together(path.parent):
    if first():
      checkpoints.save_theta(path, whole, **info)


def fingerprint(tree: Any) -> str:
  """`checkpoints.fingerprint` of a tree on the devices of all processes."""
  whole = fetched_by_first(tree)
  found = None
  if first():
    found = checkpoints.fingerprint(whole)
  return told(found)


class Checkpoints:
  """The checkpoints of a run, which process 0 writes and reads for all.

  Where all processes see its folder, each writes what it holds of a state that is cut between
  them. Any number of processes and devices goes on from a checkpoint of either kind.

  Attributes:
    latest: the step of the latest checkpoint; None if there is none.
  """

  def __init__(self, folder: pathlib.Path, keep: int, seen: pathlib.Path | None = None):
    """Args: folder, of this process; keep, how many; seen, the folder of the run if all see it."""
    self.latest: int | None = None
    self._folder = folder
    self._seen = seen
    self._own: checkpoints.Checkpoints | None = None
    with together():
      if first():
        self._own = checkpoints.Checkpoints(folder, keep)
        self.latest = self._own.latest
    self.latest = told(self.latest)

  def save(self, step: int, state: Any, about: dict) -> None:
    """Starts writing a checkpoint, see `checkpoints.Checkpoints.save`."""
    if step == self.latest:
      return
    if self._seen is not None and pieces.are_cut(jax.tree.leaves(state)):
      self._save_pieces(self._seen, step, state, about)
    else:
      whole = fetched_by_first(state)
      with written_together(self._folder.parent):
        if self._own is not None:
          self._own.save(step, whole, about)
    if self._own is None:
      (self._folder / str(step)).mkdir(parents=True, exist_ok=True)  # its name, for `goes_on`
    self.latest = step

  def _save_pieces(self, seen: pathlib.Path, step: int, state: Any, about: dict) -> None:
    """Writes a checkpoint by all processes; returns when it is on the disk."""
    folder = self._folder.parent
    with written_together(folder):
      if first():
        pieces.begun(seen, step)
    with written_together(folder), writing.told(seen, permissions=True):
      pieces.write(seen, step, jax.process_index(), jax.tree.leaves(state))
    with written_together(folder):
      if self._own is not None:
        self._own.finish_pieces(step, state, about, jax.process_count())

  def newest(
    self, like: Callable[[int], Any], tell: Callable[[str], None]
  ) -> tuple[int, Any, dict] | None:
    """(step, state on its devices, about) of the latest checkpoint that can be read, else None.

    Args:
      like: the number of updates -> shapes of the state with their shardings.
      tell: called with a sentence for each checkpoint that cannot be read.

    Raises:
      cli.Mistake: it is the state of something else.
    """
    arrays = None
    found = None
    with together():
      if self._own is not None:
        newest = self._own.newest(like, tell, whole=self._seen is None)
        if newest is not None:
          step, arrays, about = newest
          found = step, about, arrays is None
    found = told(found)
    if found is None:
      self.latest = None
      if self._own is None:
        shutil.rmtree(self._folder, ignore_errors=True)  # names of what process 0 has not
      return None
    self.latest, about, in_pieces = found
    wanted, structure = jax.tree.flatten(like(self.latest))
    if in_pieces:
      with together():
        restored = pieces.Pieces(self._seen / str(self.latest), about, wanted).placed()
      return self.latest, jax.tree.unflatten(structure, restored), about
    if arrays is None:
      arrays = [np.zeros(x.shape, x.dtype) for x in wanted]
    restored = [placed(sent(x), leaf.sharding) for x, leaf in zip(arrays, wanted, strict=True)]
    return self.latest, jax.tree.unflatten(structure, restored), about

  def wait(self) -> None:
    """Returns in all processes when all checkpoints are on disk."""
    with written_together(self._folder.parent):
      if self._own is not None:
        self._own.wait()

  def close(self) -> None:
    """Ends the writer of checkpoints."""
    if self._own is not None:
      self._own.close()
