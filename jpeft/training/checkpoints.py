"""What a run keeps: theta as a safetensors file, the whole training state through Orbax.

A checkpoint holds theta, the optimizer's state, sums since the last line of the log and the
position in the data. Random keys are folded from the seed and the step, so the step is their state.
Orbax writes in the background under a temporary name and renames at the end: what a kill leaves
half written is never read.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

# Orbax says at every start that it finds no sharding files, no process index and the like.
logging.getLogger('absl').setLevel(logging.ERROR)


def names(tree) -> dict[str, Any]:
  """{'/'-joined path: leaf} in the order of the leaves."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def fingerprint(tree) -> str:
  """The SHA-256 of a tree: of names, dtypes, shapes and bytes."""
  digest = hashlib.sha256()
  for name, leaf in names(tree).items():
    digest.update(f'{name} {leaf.dtype} {leaf.shape}\n'.encode())
    digest.update(_bytes(leaf))
  return digest.hexdigest()


def write(path: pathlib.Path, text: str) -> None:
  """Writes a text file as a whole or not at all."""
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)


def save_theta(path: pathlib.Path, theta, **about) -> None:
  """Writes theta as one safetensors file, whole or not at all.

  Args:
    path: of the file.
    theta: {method name: {site path: arrays}}.
    **about: JSON values kept in its header, such as step=100.
  """
  temporary = path.with_name(f'.{path.name}.tmp')
  arrays = {name: np.ascontiguousarray(leaf) for name, leaf in names(theta).items()}
  temporary.write_bytes(save(arrays, {key: json.dumps(value) for key, value in about.items()}))
  os.replace(temporary, path)


def load_theta(path: pathlib.Path, like) -> tuple[Any, dict]:
  """(theta, about) of a file that `save_theta` wrote.

  Args:
    path: of the file.
    like: the theta that is expected; shapes will do.

  Raises:
    FileNotFoundError, ValueError: no such file, not such a file, or the theta of another method.
  """
  if not path.is_file():
    raise FileNotFoundError(f'there is no file {path}')
  try:
    with safe_open(path, 'numpy') as file:
      about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
      held = {name: file.get_tensor(name) for name in file.keys()}
  except (SafetensorError, json.JSONDecodeError) as error:
    raise ValueError(f'{path} is not a readable safetensors file: {error}') from error
  wanted = names(like)
  if held.keys() != wanted.keys():
    raise ValueError(
      f'{path} holds another theta: it lacks {_few(wanted.keys() - held.keys())} and has '
      f'{_few(held.keys() - wanted.keys())} too many'
    )
  for name, leaf in wanted.items():
    if held[name].shape != leaf.shape:
      raise ValueError(
        f'{path}: {name} has the shape {held[name].shape}, the model wants {leaf.shape}'
      )
  leaves = [jnp.asarray(held[name], leaf.dtype) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves), about


def _few(found) -> str:
  listed = sorted(found)
  return (
    ', '.join(listed[:3]) + (f' and {len(listed) - 3} more' if len(listed) > 3 else '') or 'nothing'
  )


def _bytes(leaf) -> np.ndarray:
  return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _layout(tree) -> list:
  return [[name, str(leaf.dtype), list(leaf.shape)] for name, leaf in names(tree).items()]


class Checkpoints:
  """The checkpoints of one run, in a folder of their own, named by step.

  The state is one array of bytes, its leaves one after the other, and `about` says which: one array
  is written in a fraction of the time of hundreds, and has one checksum.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    self.folder = folder.absolute()
    if self.folder.exists():
      for left in self.folder.glob('*tmp*'):  # what a kill cut short
        shutil.rmtree(left, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    self._manager = ocp.CheckpointManager(
      self.folder, options=options, item_names=('state', 'about')
    )

  @property
  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state, about: dict) -> None:
    """Starts writing a checkpoint. The state is copied first, since the next update donates its
    arrays.
    """
    if step == self.latest:
      return
    data = np.concatenate([_bytes(x) for x in jax.tree.leaves(state)])
    about = about | {'sha256': hashlib.sha256(data).hexdigest(), 'leaves': _layout(state)}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave({'bytes': data}), about=ocp.args.JsonSave(about)
      ),
    )

  def restore(self, like) -> tuple[Any, dict]:
    """(state, about) of the latest checkpoint.

    Args:
      like: a state of the same structure, with the shardings that are wanted.

    Raises:
      ValueError: it cannot be read, is not what was written, or is the state of something else.
    """
    where = self.folder / str(self.latest)
    way_out = f'delete that folder, and the run goes on from {self._before()}'
    read = lambda **what: self._manager.restore(self.latest, args=ocp.args.Composite(**what))
    size = sum(x.nbytes for x in jax.tree.leaves(like))
    try:
      about = read(about=ocp.args.JsonRestore())['about']
      if about['leaves'] != _layout(like):
        raise ValueError('it is of another method or optimizer')
      target = {'bytes': np.zeros(size, np.uint8)}
      data = np.asarray(read(state=ocp.args.StandardRestore(target))['state']['bytes'])
      if hashlib.sha256(data).hexdigest() != about['sha256']:
        raise ValueError('it is not what was written')
    except Exception as error:  # whatever a damaged file makes of its readers
      why = str(error) if str(error).startswith('it is') else type(error).__name__
      raise ValueError(f'the checkpoint {where} cannot be used ({why}): {way_out}') from error
    leaves, start = [], 0
    for leaf in jax.tree.leaves(like):
      part = data[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
      leaves.append(jax.device_put(part, leaf.sharding))
      start += leaf.nbytes
    return jax.tree.unflatten(jax.tree.structure(like), leaves), about

  def _before(self) -> str:
    earlier = self._manager.all_steps()[:-1]
    return f'step {max(earlier)}' if earlier else 'the start'

  def wait(self) -> None:
    """Returns when all checkpoints are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()
