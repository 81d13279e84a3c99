"""Several processes as one run.

Each process holds a part of the devices, and all run the same program, each on its rows of a batch.
Process 0 reads and writes the folder of the run: the others get what they need of it from it, and
write to a folder of their own that is thrown away, but for checkpoints (`shared`).

With one process each function here does what its name says in one step, and waits for nobody.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import cli
from jpeft import config as config_lib
from jpeft.core import leaf_paths

from . import checkpoints, sharding

# Bytes of an error that the other processes are told.
_LONGEST = 4000


def several() -> bool:
  """Whether this process is one of several that run together."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def count() -> int:
  """The number of processes of the run."""
  return jax.process_count() if several() else 1


def first() -> bool:
  """Whether this process reads and writes the folder of the run."""
  return not several() or jax.process_index() == 0


# ---- What all processes do or leave together.


class Everywhere(cli.Mistake):
  """A mistake in one process that all of them know, and end with."""


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Turns errors into a `cli.Mistake`, as `cli.inputs_checked` does, in all processes if in one.

  What is done inside must not wait for other processes: one of them may have left it.

  Raises:
    Everywhere: a mistake in this process, or 'process N: ...' in another one.
  """
  if not several():
    with cli.inputs_checked():
      yield
    return
  failed: Exception | None = None
  try:
    with cli.inputs_checked():
      yield
  except Exception as error:
    failed = error
  number, text = _first_failure(failed)
  if failed is not None and not isinstance(failed, cli.Mistake):
    raise failed
  if number is not None:
    where = '' if number == jax.process_index() else f'process {number}: '
    raise Everywhere(f'{where}{text}') from failed


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
  """Waits at its end for all processes, if all of them come to it: complete, stopped or refused.

  Process 0 has the most to do there, such as figures and uploads. A process that had ended before
  would count as lost, and would take process 0 with it.
  """
  try:
    yield
  except (Everywhere, cli.Diverged, cli.Stopped):
    _meet()
    raise
  _meet()


def _meet() -> None:
  """Returns when all processes have called it."""
  if several():
    multihost_utils.process_allgather(np.int32(0))


def _first_failure(failed: Exception | None) -> tuple[int | None, str]:
  """(the lowest number of a process with an error, its text); (None, '') if there is none."""
  flags = multihost_utils.process_allgather(np.int32(failed is not None))
  if not flags.any():
    return None, ''
  text = b''
  if failed is not None:
    named = str(failed)
    if not isinstance(failed, cli.Mistake):
      named = f'{type(failed).__name__}: {failed}'
    text = named.encode()[:_LONGEST]
  texts = multihost_utils.process_allgather(_padded(text, _LONGEST))
  number = int(flags.argmax())
  return number, texts[number].tobytes().rstrip(b'\0').decode(errors='replace')


def _padded(data: bytes, size: int) -> np.ndarray:
  return np.frombuffer(data.ljust(size, b'\0'), np.uint8)


def told(value: Any) -> Any:
  """The JSON value that process 0 has; those of the others are not looked at."""
  if not several():
    return value
  data = b''
  if first():
    data = json.dumps(value).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  # A power of two, so that values of many sizes take few programs.
  padded = _padded(data, 1 << max(size, 1).bit_length())
  return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes()[:size])


def agreed(answer: bool) -> bool:
  """Whether all processes say yes."""
  if not several():
    return answer
  return bool(multihost_utils.process_allgather(np.int32(answer)).all())


def check_equal(what: str, value: str) -> None:
  """Raises a mistake in all processes if they have different values, such as digests of files.

  Args:
    what: is compared, at the start of the sentence.
    value: in words.
  """
  wanted = told(value)
  with together():
    if value != wanted:
      raise ValueError(f'{what} is {value} here, and {wanted} in process 0')


def check_config(config: Any) -> None:
  """Raises a mistake in all processes if they have different configurations."""
  values = json.loads(config_lib.to_json(config))
  wanted = told(values)
  with together():
    if values != wanted:
      differing = config_lib.differences(config, config_lib.complete(wanted))
      raise ValueError(f'the config is another one than in process 0: {"; ".join(differing)}')


def check_mesh(mesh: jax.sharding.Mesh) -> None:
  """Raises a ValueError if processes run beside each other, or a mesh leaves out devices of some.

  Args:
    mesh: of the run.
  """
  if not jax.distributed.is_initialized() and jax.process_count() > 1:
    raise ValueError(
      f'these devices belong to {jax.process_count()} processes, which have not found each other: '
      'give --hosts=auto, and the same command on every host'
    )
  if several() and mesh.size != jax.device_count():
    raise ValueError(
      f'{jax.process_count()} processes have {jax.device_count()} devices, and '
      f'{sharding.named(**mesh.shape)} takes {mesh.size}: several processes share a run on all of '
      'their devices'
    )


def check_supported(config: Any) -> None:
  """Raises a ValueError for what a run of several processes cannot do."""
  if several() and config.eval.generate:
    raise ValueError(
      f'config.eval.generate={config.eval.generate}: {jax.process_count()} processes do not write '
      'texts together; leave it out, and give prompts to jpeft generate when the run is complete'
    )
  if several() and config.data.on_error == 'skip':
    raise ValueError(
      f"config.data.on_error='skip': each of {jax.process_count()} processes would know only what "
      'it has skipped itself; leave it out'
    )


# ---- Arrays.


def placed(tree: Any, sharding: Any) -> Any:
  """A tree on its devices.

  Args:
    tree: arrays that every process has as a whole, or that are on the devices of all.
    sharding: of all, or a tree of them.
  """
  if not several():
    return jax.device_put(tree, sharding)

  def put(where, x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, where)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])

  def put_all(where, part):
    return jax.tree.map(lambda x: put(where, x), part)

  return jax.tree.map(put_all, sharding, tree)


def computed(fn: Callable, sharding: Any, *args) -> Any:
  """fn(*args) on its devices.

  Args:
    fn: makes a tree of arrays.
    sharding: of all, or a tree of them.
    *args: arrays on the devices of all processes.
  """
  if not several():
    return jax.device_put(fn(*args), sharding)
  return jax.jit(fn, out_shardings=sharding)(*args)


def fetched(tree: Any) -> Any:
  """Whole NumPy arrays of a tree, the same in every process."""
  if not several():
    return jax.device_get(tree)
  return jax.tree.map(lambda x: np.asarray(_gathered(x)), tree)


def fetched_by_first(tree: Any) -> Any:
  """Whole NumPy arrays of a tree in process 0, one after the other; None in the others."""
  if not several():
    return jax.device_get(tree)
  wanted = []
  for x in jax.tree.leaves(tree):
    x = _gathered(x)
    if first():
      wanted.append(np.asarray(x))
  if not first():
    return None
  return jax.tree.unflatten(jax.tree.structure(tree), wanted)


def _gathered(x: Any) -> Any:
  """An array that this process has as a whole."""
  spread = isinstance(x, jax.Array) and not x.is_fully_addressable
  if spread and not x.is_fully_replicated:
    return multihost_utils.process_allgather(x, tiled=True)
  return x


def held(tree: Any, whole: str | None = None) -> str:
  """The SHA-256 of what this process holds of a tree; nothing is fetched from others.

  Args:
    tree: on its devices.
    whole: what `fingerprint` says of the tree, if it is known already.
  """
  if not several():
    return whole or checkpoints.fingerprint(tree)
  digest = hashlib.sha256()
  for name, leaf in leaf_paths(tree).items():
    shards = {str(shard.index): shard for shard in leaf.addressable_shards}
    for index, shard in shards.items():
      digest.update(f'{name} {leaf.dtype} {leaf.shape} {index}\n'.encode())
      digest.update(checkpoints.bytes_of(shard.data))
  return digest.hexdigest()


def sent(x: np.ndarray) -> np.ndarray:
  """The array of process 0, in all of them; the others give one of its shape and dtype."""
  if not several():
    return x
  # As bytes: a sum over processes, which this is, keeps no NaN and knows not all dtypes.
  data = multihost_utils.broadcast_one_to_all(checkpoints.bytes_of(x))
  return np.asarray(data).view(x.dtype).reshape(x.shape)


class Rows:
  """The rows of a batch that the devices of this process need.

  Attributes:
    size: rows of a whole batch.
    here: their numbers, ascending; None for all.
  """

  def __init__(self, mesh: jax.sharding.Mesh, size: int):
    """Args: mesh of the run; size, rows of a batch."""
    self.size = size
    self.here: np.ndarray | None = None
    self._mesh = mesh
    if several():
      parts = sharding.over_data(mesh).addressable_devices_indices_map((size,)).values()
      self.here = np.unique(np.concatenate([np.arange(size)[part] for part in parts]))

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on its devices, from the rows of it that are made here."""
    where = sharding.of_batch(self._mesh, batch)
    if self.here is None:
      return jax.device_put(dict(batch), where)
    return {name: self._put(x, where[name]) for name, x in batch.items()}

  def _put(self, x: np.ndarray, where: NamedSharding) -> jax.Array:
    def part(index):
      start, stop, _ = index[0].indices(self.size)
      begin = np.searchsorted(self.here, start)
      return x[(slice(begin, begin + stop - start), *index[1:])]

    return jax.make_array_from_callback((self.size, *x.shape[1:]), where, part)


# ---- The end before the last update.

# What a process sends that cannot go on; above all numbers of signals.
_FAILED = 1000


class Stop:
  """Whether a signal asks for an end: called by all processes alike, it answers all alike.

  Each call sends the signal of this process to all, and answers by what the call before has sent,
  so that it does not wait for the devices: a signal to one process ends all after the same update.

  Attributes:
    caught: the number of the signal that all know of, or another number where one of them cannot go
      on; None before.
  """

  def __init__(self, signals: Any, mesh: jax.sharding.Mesh):
    """Args: signals, whose `caught` is a number or None; mesh of the run."""
    self.caught: int | None = None
    self._signals = signals
    self._failure: Exception | None = None
    self._sent: jax.Array | None = None
    self._size = mesh.size
    self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._highest = jax.jit(
      lambda votes: votes.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
    )

  def __call__(self) -> int | None:
    if not several():
      self.caught = self._signals.caught
      return self.caught
    own = np.full(1, self._signals.caught or 0, np.int32)
    if self._failure is not None:
      own[:] = _FAILED
    votes = jax.make_array_from_callback((self._size,), self._each, lambda _: own)
    before, self._sent = self._sent, self._highest(votes)
    if before is not None and self.caught is None:
      self.caught = int(before) or None
    return self.caught

  def look_ahead(self, check: Callable[[], Any]) -> None:
    """Lets the next call send that this process cannot go on, if `check` raises.

    What is checked must be of the update after the next one, which all processes still make. One
    process alone finds out by itself.
    """
    if not several() or self._failure is not None:
      return
    try:
      check()
    except Exception as error:
      self._failure = error

  def guarded(self, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; before one of them is used, each process knows that all have read theirs.

    Where one has not, the next call gives the sign to end, and no batch of it may be used.

    Raises:
      Everywhere: a process cannot read the first.
    """
    if not several():
      yield from batches
      return
    with together():
      batch = next(batches, None)
    while batch is not None:
      following = None
      try:
        following = next(batches, None)
      except Exception as error:
        self._failure = self._failure or error
        following = {}  # never used: the next call answers that there is an end
      yield batch
      batch = following

  def raise_failure(self) -> None:
    """Raises in all processes what one of them could not go on for, if there is such."""
    if several() and self.caught == _FAILED:
      with together():
        if self._failure is not None:
          raise self._failure
