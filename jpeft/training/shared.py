"""The folder of a run of several processes: process 0 alone reads and writes it."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from . import checkpoints
from .hosts import fetched_by_first, first, placed, sent, several, together, told


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

  A checkpoint contains whole arrays, so that any number of processes and devices goes on from it.

  Attributes:
    latest: the step of the latest checkpoint; None if there is none.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    self.latest: int | None = None
    self._folder = folder
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
    whole = fetched_by_first(state)
    if self._own is not None:
      self._own.save(step, whole, about)
    else:
      (self._folder / str(step)).mkdir(parents=True, exist_ok=True)  # its name, for `goes_on`
    self.latest = step

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
        newest = self._own.newest(like, tell)
        if newest is not None:
          step, arrays, about = newest
          found = step, about
    found = told(found)
    if found is None:
      self.latest = None
      if self._own is None:
        shutil.rmtree(self._folder, ignore_errors=True)  # names of what process 0 has not
      return None
    self.latest, about = found
    wanted, structure = jax.tree.flatten(like(self.latest))
    if arrays is None:
      arrays = [np.zeros(x.shape, x.dtype) for x in wanted]
    restored = [placed(sent(x), leaf.sharding) for x, leaf in zip(arrays, wanted, strict=True)]
    return self.latest, jax.tree.unflatten(structure, restored), about

  def wait(self) -> None:
    """Returns in all processes when all checkpoints are on disk."""
    if not several():
      self._own.wait()  # a disk that is full is told with where the run goes on
      return
    with together():
      if self._own is not None:
        self._own.wait()

  def close(self) -> None:
    """Ends the writer of checkpoints."""
    if self._own is not None:
      self._own.close()
