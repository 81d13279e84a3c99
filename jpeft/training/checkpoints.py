"""What a run stores: theta as a safetensors file, the whole training state through Orbax.

A checkpoint contains theta, the optimizer's state, the sums since the last line of the log and the
position in the data. Random keys are folded from the seed and the step, so the step is their state.
Orbax writes in the background under a temporary name and renames at the end: a file that a kill
leaves half written is never read.
"""

import hashlib
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jpeft import jsonfiles, textfiles, writing
from jpeft.core import leaf_paths
from jpeft.messages import few
from jpeft.writing import write

from . import pieces
from .pieces import bytes_of

# Orbax logs at every start that it finds no sharding files, no process index and the like, and the
# traceback of every error that it raises besides.
logging.getLogger('absl').setLevel(logging.CRITICAL)


# ---- Trees.


def fingerprint(tree) -> str:
  """The SHA-256 of the names, dtypes, shapes and bytes of a tree."""
  digest = hashlib.sha256()
  for name, leaf in leaf_paths(tree).items():
    digest.update(f'{name} {leaf.dtype} {leaf.shape}\n'.encode())
    digest.update(bytes_of(leaf))
  return digest.hexdigest()


def _size(leaf) -> int:
  """The bytes of an array, from its shape."""
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def _layout(tree) -> list:
  return [[name, str(leaf.dtype), list(leaf.shape)] for name, leaf in leaf_paths(tree).items()]


# ---- Theta.


def save_theta(path: pathlib.Path, theta, **info) -> None:
  """Writes theta as one safetensors file, whole or not at all.

  Args:
    path: of the file.
    theta: {method name: {site path: arrays}}.
    **info: JSON values for its header, such as step=100.
  """
  # Not np.ascontiguousarray, which makes vectors of scalars.
  arrays = {name: np.asarray(leaf, order='C') for name, leaf in leaf_paths(theta).items()}
  header = {key: json.dumps(value) for key, value in info.items()}
  write(path, save(arrays, header))


def is_theta(path: pathlib.Path) -> bool:
  """Whether a file is there, and a whole safetensors file by its header and its length."""
  try:
    with safe_open(path, 'numpy'):
      return True
  except (SafetensorError, OSError):
    return False


def read_theta(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """({path in theta: array}, info) of a file that `save_theta` wrote.

  Raises:
    FileNotFoundError, ValueError: no such file, or not such a file.
  """
  if not path.exists():
    raise FileNotFoundError(f'there is no file {path}')
  textfiles.check_regular(path)
  try:
    with safe_open(path, 'numpy') as file:
      header = file.metadata() or {}
      info = {key: jsonfiles.parsed(value, f'{key!r} of {path}') for key, value in header.items()}
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except (SafetensorError, OSError) as error:
    raise ValueError(f'{path} is not a readable safetensors file: {error}') from error
  return arrays, info


def load_theta(path: pathlib.Path, like) -> tuple[Any, dict]:
  """(theta, info) of a file that `save_theta` wrote.

  Args:
    path: of the file.
    like: the theta that is expected; shapes are enough.

  Raises:
    FileNotFoundError, ValueError: no such file, not such a file, or the theta of another method.
  """
  arrays, info = read_theta(path)
  wanted = leaf_paths(like)
  if arrays.keys() != wanted.keys():
    raise ValueError(
      f'{path} holds another theta: it lacks {few(sorted(wanted.keys() - arrays.keys()))} and has '
      f'{few(sorted(arrays.keys() - wanted.keys()))} too many'
    )
  for name, leaf in wanted.items():
    arrays[name] = of_older_file(arrays[name], leaf)
    if arrays[name].shape != leaf.shape:
      raise ValueError(
        f'{path}: {name} has the shape {arrays[name].shape}, the model wants {leaf.shape}'
      )
  leaves = [jnp.asarray(arrays[name], leaf.dtype) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves), info


def of_older_file(x: np.ndarray, like) -> np.ndarray:
  """An array of a theta file; older files have scalars as vectors of one number."""
  if like.shape == () and x.shape == (1,):
    return x.reshape(())
  return x


# ---- The training state.


DAMAGED = 'damaged'  # the folder of a run for checkpoints that cannot be read


class _OfSomethingElse(ValueError):
  """A checkpoint whose arrays are not those of the run."""


class Unreadable(ValueError):
  """A checkpoint that cannot be read, or is not what was written."""


def steps_of(folder: pathlib.Path) -> list[int]:
  """The steps of the complete checkpoints in a folder of them; nothing is created or read."""
  return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())


def damaged(folder: pathlib.Path) -> list[str]:
  """The names of the checkpoints of a run that could not be read."""
  return sorted(path.name for path in (folder / DAMAGED).glob('*'))


class Checkpoints:
  """The checkpoints of one run, in a folder of their own, named by step.

  The state is one array of bytes, its leaves one after the other; `about` has their names, dtypes
  and shapes. One array is written in a fraction of the time of hundreds, and has one checksum.
  Its files are brought to the disk before they get their name. Several processes may write one in
  pieces, see pieces.py.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    self.folder = folder.absolute()
    self._keep = keep
    if self.folder.exists():
      for left in self.folder.glob('*tmp*'):  # cut short by a kill
        shutil.rmtree(left, ignore_errors=True)
    # As if this process were alone: the others neither write nor read files.
    number = jax.process_index()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=False,
      async_options=ocp.options.AsyncOptions(post_finalization_callback=self._bring_to_disk),
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}
      ),
    )
    with self._told():
      self.folder.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        self.folder, options=options, item_names=('state', 'about')
      )

  def _bring_to_disk(self) -> None:
    """Called when a checkpoint is written, and before it gets its name."""
    for part in self.folder.glob('*tmp*'):
      writing.sync_tree(part)

  @property
  def latest(self) -> int | None:
    """The step of the latest checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state, about: dict) -> None:
    """Starts writing a checkpoint.

    The state is copied first, because the next update donates its arrays.
    """
    if step == self.latest:
      return
    data = np.concatenate([bytes_of(x) for x in jax.tree.leaves(state)])
    about = about | {'sha256': hashlib.sha256(data).hexdigest(), 'leaves': _layout(state)}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave({'bytes': data}), about=ocp.args.JsonSave(about)
    )
    with self._told():  # of this one or of the one before, which was written meanwhile
      self._manager.save(step, args=items)

  def finish_pieces(self, step: int, state, about: dict, count: int) -> None:
    """Names a checkpoint that `count` processes have written in pieces; blocks."""
    with self._told():
      self._manager.wait_until_finished()
      pieces.finished(self.folder, step, about | {'leaves': _layout(state)}, count)
      self._manager.reload()
    self.wait()

  def newest(
    self, like: Callable[[int], Any], tell: Callable[[str], None], whole: bool = True
  ) -> tuple[int, list[np.ndarray] | None, dict] | None:
    """(step, arrays of the state, about) of the latest checkpoint that can be read, else None.

    Those that cannot are moved to the folder `damaged` of the run.

    Args:
      like: the number of updates -> a state of the same structure; shapes are enough.
      tell: called with a sentence for each of them.
      whole: False: None in place of the arrays of a checkpoint in pieces, which are checked.

    Raises:
      ValueError: it is the state of something else.
    """
    while self.latest is not None:
      step = self.latest
      try:
        return step, *self.read(like(step), whole)
      except Unreadable as error:
        place = self._set_aside(step)
        tell(f'warning: {error}; it is now {place}, and the run goes on from {self._last()}')
    return None

  def _set_aside(self, step: int) -> pathlib.Path:
    """Moves a checkpoint to where it is kept and not read; returns its place."""
    aside = self.folder.parent / DAMAGED
    aside.mkdir(exist_ok=True)
    place = aside / str(step)
    while place.exists():
      place = place.with_name(f'{place.name}_again')
    (self.folder / str(step)).rename(place)
    self._manager.reload()
    return place

  def restore(self, like) -> tuple[Any, dict]:
    """(state, about) of the latest checkpoint.

    Args:
      like: a state of the same structure, with the wanted shardings.

    Raises:
      Unreadable: it cannot be read, or is not what was written.
      ValueError: it is the state of something else.
      PermissionError: its files may not be read.
    """
    arrays, about = self.read(like)
    leaves, structure = jax.tree.flatten(like)
    placed = [jax.device_put(x, leaf.sharding) for x, leaf in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(structure, placed), about

  def read(self, like, whole: bool = True) -> tuple[list[np.ndarray] | None, dict]:
    """(the arrays of the state in their order, about) of the latest checkpoint.

    Args:
      like: a state of the same structure; shapes are enough.
      whole: see `newest`.

    Raises:
      Unreadable, ValueError, PermissionError: as `restore`.
    """
    place = self.folder / str(self.latest)
    for path in place.rglob('*'):
      if path.is_file():
        path.open('rb').close()  # a missing permission is no damage
    try:
      about = pieces.about_of(place)
      if about is not None:
        return self._in_pieces(place, about, like, whole), about
      data, about = self._read(like)
    except (_OfSomethingElse, MemoryError):
      raise
    except Exception as error:  # the readers raise all sorts of errors on a damaged file
      reason = str(error)
      if not reason.startswith('it is'):
        reason = type(error).__name__
      raise Unreadable(f'the checkpoint {place} cannot be read ({reason})') from error
    arrays = []
    start = 0
    for leaf in jax.tree.leaves(like):
      end = start + _size(leaf)
      arrays.append(data[start:end].view(leaf.dtype).reshape(leaf.shape))
      start = end
    return arrays, about

  def _read(self, like) -> tuple[np.ndarray, dict]:
    """(the bytes of the state, about) of the latest checkpoint, checked."""

    def item(**what):
      return self._manager.restore(self.latest, args=ocp.args.Composite(**what))

    about = item(about=ocp.args.JsonRestore())['about']
    self._check_layout(about, like)
    size = sum(_size(x) for x in jax.tree.leaves(like))
    target = {'bytes': np.zeros(size, np.uint8)}
    data = np.asarray(item(state=ocp.args.StandardRestore(target))['state']['bytes'])
    if hashlib.sha256(data).hexdigest() != about['sha256']:
      raise ValueError('it is not what was written')
    return data, about

  def _in_pieces(self, place, about: dict, like, whole: bool) -> list[np.ndarray] | None:
    """The arrays of a checkpoint in pieces, checked; None unless `whole`."""
    self._check_layout(about, like)
    found = pieces.Pieces(place, about, jax.tree.leaves(like))
    found.check()
    return found.whole() if whole else None

  def _check_layout(self, about: dict, like) -> None:
    if about['leaves'] != _layout(like):
      step = self.latest
      raise _OfSomethingElse(
        f'the checkpoint {self.folder / str(step)} is of another method or optimizer: delete '
        f'that folder, and the run goes on from {self._last(before=step)}'
      )

  def _last(self, before: int | None = None) -> str:
    """Where a run goes on whose checkpoints are those before a step."""
    steps = [step for step in self._manager.all_steps() if before is None or step < before]
    if not steps:
      return 'the start'
    return f'step {max(steps)}'

  def wait(self) -> None:
    """Returns when all checkpoints are on disk, and none is there but the newest `keep`."""
    with self._told():
      self._manager.wait_until_finished()
      # A kill may have come when the newest was written, and before the oldest was removed.
      for step in sorted(self._manager.all_steps())[: -self._keep]:
        self._manager.delete(step)
      writing.sync(self.folder)

  def close(self) -> None:
    """Ends the writer of checkpoints."""
    with self._told():
      self._manager.close()

  def _told(self):
    return writing.told(self.folder, permissions=True)
