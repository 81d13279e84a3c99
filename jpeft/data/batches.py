"""Batches in an order that a seed fixes, from any position, with the next ones made ahead."""

import collections
import concurrent.futures
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .skipped import FARTHEST, UNREADABLE, Skipped
from .source import Example, Transform

Batch = dict[str, np.ndarray]
# JAX computes with 32 bits unless told otherwise.
NARROW = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}


class Batches(Iterator[Batch]):
  """An iterator of batches {name: array [B, ...]}.

  The order of an epoch depends on (seed, epoch) alone, and what `transform` draws on (seed, epoch,
  number of the example). So a batch is the same however the iteration came to it: `state` returns
  a position, and `restore` goes there without reading what is before it. The number of processes
  is no part of the state.

  Attributes:
    steps_per_epoch: batches an epoch.
  """

  def __init__(
    self,
    source,
    batch_size: int,
    transform: Transform | None = None,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
    skipped: Skipped | None = None,
    rows: Sequence[int] | None = None,
  ):
    """Starts at the first batch of the first epoch.

    Args:
      source: anything with len and [i] -> dict of an example.
      batch_size: examples a batch, of all processes together.
      transform: (example, rng) -> dict of arrays and numbers whose shapes are the same for all
        examples. None takes the examples as they are.
      seed: seed of the order and of what `transform` draws.
      shuffle: a new order each epoch; False keeps that of the source.
      epochs: passes over the source; None for no end.
      drop_remainder: leave out the last len(source) % batch_size examples of an epoch. False fills
        the last batch up with copies of its last example and adds 'mask', float32 [B], 0 at copies,
        to all.
      prefetch: number of batches made ahead, each in a thread of its own; the source and the
        transform must be thread-safe. 1 for a single thread, 0 for none.
      process_index: number of the part of each batch that this process makes.
      process_count: number of equal parts that a batch is cut into.
      skipped: takes in the examples of the batches so far that cannot be read. In the place of such
        an example is the next one that can; with drop_remainder=False its mask is 0. None for an
        error at the first of them.
      rows: numbers of the rows of each batch that this process makes, instead of a part by
        process_index and process_count.

    Raises:
      ValueError: the source is empty or smaller than a batch, batch_size is not divisible by
        process_count, a number is out of range, or both rows and process_count are given.
    """
    _check_least('batch_size', batch_size, 1)
    _check_least('seed', seed, 0)
    _check_least('prefetch', prefetch, 0)
    if epochs is not None:
      _check_least('epochs', epochs, 0)
    if not 0 <= process_index < process_count:
      raise ValueError(f'process_index={process_index} is not below process_count={process_count}')
    if batch_size % process_count:
      raise ValueError(f'batch_size={batch_size} is not divisible by process_count={process_count}')
    if rows is not None and process_count > 1:
      raise ValueError('rows and process_count both say what this process makes: give one')
    if not len(source):
      raise ValueError('the source has no examples')
    if drop_remainder and batch_size > len(source):
      raise ValueError(
        f'batch_size={batch_size} is more than the {len(source)} examples of the source; make '
        'it smaller or set drop_remainder=False'
      )
    self._source = source
    self._transform = transform
    self._skipped = skipped
    self._keep_all = not drop_remainder
    if drop_remainder:
      self.steps_per_epoch = len(source) // batch_size
    else:
      self.steps_per_epoch = math.ceil(len(source) / batch_size)
    self._end = None  # batches in all epochs; None for no end
    if epochs is not None:
      self._end = epochs * self.steps_per_epoch
    # What a position means; a state made under other values is refused.
    self._settings = {
      'seed': seed,
      'batch_size': batch_size,
      'examples': len(source),
      'shuffle': shuffle,
      'drop_remainder': drop_remainder,
    }
    part = batch_size // process_count
    self._part = np.arange(process_index * part, (process_index + 1) * part)
    if rows is not None:
      self._part = np.asarray(rows, int)
    # Two epochs, because the batches ahead may be of the next one.
    self._order = functools.lru_cache(2)(self._epoch_order)
    self._next = 0  # batches yielded since the first epoch began
    self._prefetch = prefetch
    self._ahead = collections.deque()
    self._threads = None
    if prefetch:
      self._threads = concurrent.futures.ThreadPoolExecutor(prefetch, 'batches')

  def __next__(self) -> Batch:
    if self._next == self._end:
      raise StopIteration
    if self._threads is None:
      batch, failures = self._batch(self._next)
    else:
      self._make_ahead()
      # Removed only when it has come: a batch whose reading fails raises again at the next call.
      batch, failures = self._ahead[0].result()
      self._ahead.popleft()
    if self._skipped is not None:
      self._skipped.add(failures)
    self._next += 1
    self._make_ahead()
    return batch

  def check(self, ahead: int) -> None:
    """Waits for a batch without taking it, and raises what the reading of it raises.

    Args:
      ahead: how many come before it, fewer than `prefetch`.
    """
    self._make_ahead()
    if ahead < len(self._ahead):
      self._ahead[ahead].result()

  def state(self) -> dict[str, Any]:
    """The position after the batch that was yielded last, as a dict for JSON."""
    epoch, batch = divmod(self._next, self.steps_per_epoch)
    return {'epoch': epoch, 'batch': batch, **self._settings}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes to the position of `state`, as fast to a late one as to an early one.

    Raises:
      ValueError: it is no state, or that of batches of another source, size, seed or kind.
    """
    for name in ('epoch', 'batch', *self._settings):
      if name not in state:
        raise ValueError(f'the state {state} has no {name!r}')
    for name, value in self._settings.items():
      if state[name] != value:
        raise ValueError(
          f'the state was taken with {name}={state[name]}, these batches have {name}={value}'
        )
    number = state['epoch'] * self.steps_per_epoch + state['batch']
    if number < 0 or (self._end is not None and number > self._end):
      raise ValueError(
        f'epoch {state["epoch"]}, batch {state["batch"]} is beyond the end of these batches'
      )
    for future in self._ahead:
      future.cancel()
    self._ahead.clear()
    self._next = number

  def _make_ahead(self) -> None:
    while len(self._ahead) < self._prefetch:
      number = self._next + len(self._ahead)
      if number == self._end:
        return
      self._ahead.append(self._threads.submit(self._batch, number))

  def _batch(self, number: int) -> tuple[Batch, dict[int, str]]:
    """(this process's part of a batch, {number of an example that cannot be read: why})."""
    epoch, batch = divmod(number, self.steps_per_epoch)
    size = self._settings['batch_size']
    start = batch * size
    rows = self._order(epoch)[start : start + size]
    real = np.arange(size) < len(rows)  # False at the copies that fill up
    # The last batch is filled up, so that all batches have one shape and compile once.
    rows = np.pad(rows, (0, size - len(rows)), mode='edge')
    failures: dict[int, str] = {}
    examples = [self._readable(epoch, int(row), failures) for row in rows[self._part]]
    arrays = _stacked(examples)
    if self._keep_all:
      if 'mask' in arrays:
        raise ValueError(
          "the transform returns 'mask', which is the name of the mask over examples"
        )
      whole = [int(row) not in failures for row in rows[self._part]]
      arrays['mask'] = (real[self._part] & whole).astype(np.float32)
    return arrays, failures

  def _readable(self, epoch: int, row: int, failures: dict[int, str]) -> Example:
    """An example or, where it is to be skipped, the next one that can be read.

    Which one that is depends on the examples alone, so a run that goes on meets the same.
    """
    if self._skipped is None:
      return self._example(epoch, row)
    for distance in range(min(FARTHEST, len(self._source))):
      candidate = (row + distance) % len(self._source)
      try:
        return self._example(epoch, candidate)
      except UNREADABLE as error:
        failures[candidate] = ' '.join(str(error).split())
        last = error
    raise ValueError(
      f'{distance + 1} examples in a row cannot be read, which is more than can be skipped: the '
      f'last of them, {candidate}: {last}'
    ) from last

  def _example(self, epoch: int, row: int) -> Example:
    example = self._source[row]
    if self._transform is None:
      return example
    rng = np.random.Generator(self._bits(epoch, row))
    return self._transform(example, rng)

  def _epoch_order(self, epoch: int) -> np.ndarray:
    """The numbers of all examples in the order of an epoch."""
    size = self._settings['examples']
    if not self._settings['shuffle']:
      return np.arange(size)
    # NumPy promises the raw bits across its versions, but not the result of Generator.permutation.
    keys = self._bits(epoch).random_raw(size)
    return np.argsort(keys, kind='stable')

  def _bits(self, *key: int) -> np.random.Philox:
    """Random bits of their own for an epoch (epoch), and for an example in it (epoch, row)."""
    seed = np.random.SeedSequence(self._settings['seed'], spawn_key=key)
    return np.random.Philox(seed)


def _check_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise ValueError(f'{name}={value} is less than {least}')


def _stacked(examples: list[Example]) -> Batch:
  """The arrays of the examples, stacked; numbers become int32 or float32."""
  batch = {}
  for name in examples[0]:
    try:
      values = [np.asarray(example[name]) for example in examples]
    except KeyError:
      raise ValueError(f'an example of a batch has {name!r}, another has not') from None
    shapes = sorted({value.shape for value in values})
    if len(shapes) > 1:
      raise ValueError(
        f'{name!r} has the shapes {shapes[0]} and {shapes[-1]} in one batch; give a transform '
        'that makes them alike'
      )
    stacked = np.stack(values)  # [B, ...]
    dtype = NARROW.get(stacked.dtype, stacked.dtype)
    batch[name] = stacked.astype(dtype, copy=False)
  return batch
