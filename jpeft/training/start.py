"""A run that starts from the theta of another run (`method.start`).

With `method.start_head=False` the head starts fresh whatever the file has. So a method that was
trained on one data set starts the next from there: PVP, Song et al., 2023 (arXiv 2304.13639), for
any method.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import jsonfiles
from jpeft.core import Tuned, join_path, leaf_paths
from jpeft.messages import few

from .checkpoints import of_older_file, read_theta, steps_of

# The adapter that `methods.make` adds for the head.
_HEAD = 'head'


@dataclasses.dataclass(frozen=True)
class Start:
  """What of a theta file stands in for what a method starts with.

  Attributes:
    sha256: of the file.
    arrays: {path in theta: array}; empty where a run goes on from a checkpoint.
    told: which arrays come from the file, which start fresh, and which were left out.
  """

  sha256: str
  arrays: dict[str, np.ndarray]
  told: str

  def put(self, theta: Any) -> Any:
    """theta with the arrays of the file in place of its own."""
    new = [jnp.asarray(self.arrays.get(path, x)) for path, x in leaf_paths(theta).items()]
    return jax.tree.unflatten(jax.tree.structure(theta), new)


def start_of(config, tuned: Tuned, folder: pathlib.Path) -> Start | None:
  """What the config says of the theta that a run starts from; None if nothing.

  Where the run has a checkpoint, theta is there: the file is not read but for its digest, and need
  not be there any more.

  Args:
    config: of the run.
    tuned: its method on its model.
    folder: of the run.

  Raises:
    FileNotFoundError, ValueError: there is no such theta, it has what the method has not, nothing
      of it agrees with the method, or it is not the one that the run was begun with.
  """
  if config.method.start is None:
    if not config.method.start_head:
      raise ValueError(
        'config.method.start_head=False leaves out the head of method.start: set that'
      )
    return None
  file = _file(pathlib.Path(config.method.start))
  begun = _digest_of_run(folder)
  if begun is not None and steps_of(folder / 'checkpoints'):
    if file.exists():
      _check_digest(file, _digest(file), begun, folder)
    return Start(begun, {}, '')
  _check_there(file, config.method.start)
  arrays, _ = read_theta(file)
  sha256 = _digest(file)
  if begun is not None:
    _check_digest(file, sha256, begun, folder)
  return _matched(file, sha256, arrays, tuned, config.method.start_head)


def _file(place: pathlib.Path) -> pathlib.Path:
  """The theta file of a run folder, or the file itself."""
  if not place.is_dir():
    return place
  return place / 'theta.safetensors'


def _check_there(file: pathlib.Path, place: str) -> None:
  if file.is_file():
    return
  if file.parent == pathlib.Path(place):
    raise FileNotFoundError(
      f'config.method.start={place} has no {file.name}: is it the folder of a run, and complete?'
    )
  raise FileNotFoundError(f'config.method.start={place}: there is no such file or run folder')


def _digest(file: pathlib.Path) -> str:
  with file.open('rb') as opened:
    return hashlib.file_digest(opened, 'sha256').hexdigest()


def _digest_of_run(folder: pathlib.Path) -> str | None:
  """The digest that a run was begun with; None where none was begun."""
  kept = folder / 'run.json'
  if not kept.exists():
    return None
  return jsonfiles.read(kept, {'start_sha256?': (str, None)}).get('start_sha256')


def _check_digest(file: pathlib.Path, found: str, begun: str, folder: pathlib.Path) -> None:
  if found != begun:
    raise ValueError(
      f'{folder} was begun with another {file}: its SHA-256 was {begun}, and is {found} now'
    )


def _matched(
  file: pathlib.Path,
  sha256: str,
  arrays: dict[str, np.ndarray],
  tuned: Tuned,
  with_head: bool,
) -> Start:
  wanted = leaf_paths(tuned.shapes)
  taken = {}
  other_head = []
  for path, x in arrays.items():
    if not with_head and _is_head(path, tuned):
      other_head.append(path)
      continue
    wrong = None
    if path not in wanted:
      wrong = 'which the method has not'
    else:
      like = wanted[path]
      x = of_older_file(x, like)
      if (x.shape, x.dtype) != (like.shape, like.dtype):
        wrong = f'{x.dtype} {list(x.shape)}, where the method has {like.dtype} {list(like.shape)}'
    if wrong is None:
      taken[path] = x
    elif _is_head(path, tuned):
      other_head.append(path)
    else:
      raise ValueError(f'{file}, that the method starts from, has {path!r}, {wrong}')
  if not taken:
    raise ValueError(
      f'{file} has nothing that the method could start from: it has {few(sorted(arrays))}, and '
      f'the method {few(sorted(wanted))}'
    )
  told = f'theta starts as {file}: {len(taken)} of {len(wanted)} arrays'
  fresh = wanted.keys() - taken.keys()
  if fresh:
    told += f'; fresh: {few(sorted(fresh))}'
  if other_head and with_head:
    told += f'; left out, another head: {few(sorted(other_head))}'
  elif other_head:
    told += f'; left out, as start_head=False says: {few(sorted(other_head))}'
  return Start(sha256, taken, told)


def _is_head(path: str, tuned: Tuned) -> bool:
  """Whether an entry of a theta file belongs to a head, of this method or of another."""
  names = {rule.name for rule, _ in tuned.rules if rule.head} | {_HEAD}
  heads = [join_path(name, site.path) for name in names for site in tuned.sites.of_role('head')]
  return any(path.startswith(f'{head}/') for head in heads)
