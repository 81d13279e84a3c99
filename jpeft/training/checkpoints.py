"""What a run stores: theta as a safetensors file, the whole training state through Orbax.

A checkpoint contains theta, the optimizer's state, the sums since the last line of the log and the
position in the data. Random keys are folded from the seed and the step, so the step is their state.
Orbax writes in the background under a temporary name and renames at the end: a file that a kill
leaves half written is never read.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jpeft.core import leaf_paths

# Orbax logs at every start that it finds no sharding files, no process index and the like.
logging.getLogger('absl').setLevel(logging.ERROR)


def write(path: pathlib.Path, text: str) -> None:
  """Writes a text file as a whole or not at all."""
  _write_bytes(path, text.encode())


def _write_bytes(path: pathlib.Path, data: bytes) -> None:
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_bytes(data)
  os.replace(temporary, path)


# ---- Trees.


def fingerprint(tree) -> str:
  """The SHA-256 of the names, dtypes, shapes and bytes of a tree."""
  digest = hashlib.sha256()
  for name, leaf in leaf_paths(tree).items():
    digest.update(f'{name} {leaf.dtype} {leaf.shape}\n'.encode())
    digest.update(_bytes(leaf))
  return digest.hexdigest()


def _bytes(leaf) -> np.ndarray:
  return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


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
  _write_bytes(path, save(arrays, header))


def read_theta(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """({path in theta: array}, info) of a file that `save_theta` wrote.

  Raises:
    FileNotFoundError, ValueError: no such file, or not such a file.
  """
  if not path.is_file():
    raise FileNotFoundError(f'there is no file {path}')
  try:
    with safe_open(path, 'numpy') as file:
      info = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except (SafetensorError, json.JSONDecodeError) as error:
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
      f'{path} holds another theta: it lacks {few(wanted.keys() - arrays.keys())} and has '
      f'{few(arrays.keys() - wanted.keys())} too many'
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


def few(found: Iterable[str]) -> str:
  """The first three names, and how many more there are."""
  listed = sorted(found)
  if not listed:
    return 'nothing'
  shown = ', '.join(listed[:3])
  if len(listed) > 3:
    shown += f' and {len(listed) - 3} more'
  return shown


# ---- The training state.


def has_checkpoint(folder: pathlib.Path) -> bool:
  """Whether a folder of checkpoints has a complete one; nothing is created or read."""
  return any(path.name.isdigit() for path in folder.glob('*'))


class Checkpoints:
  """The checkpoints of one run, in a folder of their own, named by step.

  The state is one array of bytes, its leaves one after the other; `about` has their names, dtypes
  and shapes. One array is written in a fraction of the time of hundreds, and has one checksum.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    self.folder = folder.absolute()
    if self.folder.exists():
      for left in self.folder.glob('*tmp*'):  # cut short by a kill
        shutil.rmtree(left, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    self._manager = ocp.CheckpointManager(
      self.folder, options=options, item_names=('state', 'about')
    )

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
    data = np.concatenate([_bytes(x) for x in jax.tree.leaves(state)])
    about = about | {'sha256': hashlib.sha256(data).hexdigest(), 'leaves': _layout(state)}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave({'bytes': data}), about=ocp.args.JsonSave(about)
    )
    self._manager.save(step, args=items)

  def restore(self, like) -> tuple[Any, dict]:
    """(state, about) of the latest checkpoint.

    Args:
      like: a state of the same structure, with the wanted shardings.

    Raises:
      ValueError: it cannot be read, is not what was written, or is the state of something else.
    """
    try:
      data, about = self._read(like)
    except Exception as error:  # the readers raise all sorts of errors on a damaged file
      reason = str(error)
      if not reason.startswith('it is'):
        reason = type(error).__name__
      raise ValueError(
        f'the checkpoint {self.folder / str(self.latest)} cannot be used ({reason}): '
        f'delete that folder, and the run goes on from {self._before()}'
      ) from error
    leaves = []
    start = 0
    for leaf in jax.tree.leaves(like):
      part = data[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
      leaves.append(jax.device_put(part, leaf.sharding))
      start += leaf.nbytes
    return jax.tree.unflatten(jax.tree.structure(like), leaves), about

  def _read(self, like) -> tuple[np.ndarray, dict]:
    """(the bytes of the state, about) of the latest checkpoint, checked."""

    def item(**what):
      return self._manager.restore(self.latest, args=ocp.args.Composite(**what))

    about = item(about=ocp.args.JsonRestore())['about']
    if about['leaves'] != _layout(like):
      raise ValueError('it is of another method or optimizer')
    size = sum(x.nbytes for x in jax.tree.leaves(like))
    target = {'bytes': np.zeros(size, np.uint8)}
    data = np.asarray(item(state=ocp.args.StandardRestore(target))['state']['bytes'])
    if hashlib.sha256(data).hexdigest() != about['sha256']:
      raise ValueError('it is not what was written')
    return data, about

  def _before(self) -> str:
    """Where a run without its latest checkpoint goes on."""
    earlier = self._manager.all_steps()[:-1]
    if not earlier:
      return 'the start'
    return f'step {max(earlier)}'

  def wait(self) -> None:
    """Returns when all checkpoints are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Ends the writer of checkpoints."""
    self._manager.close()
