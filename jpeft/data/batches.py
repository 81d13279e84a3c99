"""Batches in an order that a seed fixes, from any position, with the next ones made ahead."""

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]


class Batches(Iterator[dict[str, np.ndarray]]):
  """An iterator of batches {name: array [B, ...]}.

  The order of an epoch hangs on (seed, epoch) alone, and what `transform` draws on (seed, epoch,
  number of the example), so a batch is the same however one gets to it: `state` says where the
  iteration stands and `restore` goes there without reading what lies before. The number of
  processes is no part of the state.

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
  ):
    """Starts at the first batch of the first epoch.

    Args:
      source: anything with len and [i] -> dict of an example.
      batch_size: examples a batch, of all processes together.
      transform: (example, rng) -> dict of arrays and numbers whose shapes are the same for all
        examples. None takes the examples as they are.
      seed: of the order and of what `transform` draws.
      shuffle: a new order each epoch; False keeps that of the source.
      epochs: passes over the source; None for no end.
      drop_remainder: leave out the last len(source) % batch_size examples of an epoch. False fills
        the last batch up with copies of its last example and adds 'mask', float32 [B], 0 at copies,
        to all.
      prefetch: batches made ahead, each in a thread of its own: source and transform must be safe
        for that. 1 for a single thread, 0 for none.
      process_index: which part of each batch this process makes.
      process_count: equal parts that a batch is cut into.

    Raises:
      ValueError: the source is empty or smaller than a batch, batch_size is not divisible by
        process_count, or a number is out of range.
    """
    for name, value, least in (
      ('batch_size', batch_size, 1),
      ('seed', seed, 0),
      ('prefetch', prefetch, 0),
      ('epochs', 0 if epochs is None else epochs, 0),
    ):
      if value < least:
        raise ValueError(f'{name}={value} is less than {least}')
    if not 0 <= process_index < process_count:
      raise ValueError(f'process_index={process_index} is not below process_count={process_count}')
    if batch_size % process_count:
      raise ValueError(f'batch_size={batch_size} is not divisible by process_count={process_count}')
    if not len(source):
      raise ValueError('the source has no examples')
    if drop_remainder and batch_size > len(source):
      raise ValueError(
        f'batch_size={batch_size} is more than the {len(source)} examples of the source; make '
        'it smaller or set drop_remainder=False'
      )
    self.steps_per_epoch = (
      len(source) // batch_size if drop_remainder else -(-len(source) // batch_size)
    )
    self._source, self._transform, self._keep_all = source, transform, not drop_remainder
    # What a position means; a state made under other values is refused.
    self._fixed = {
      'seed': seed,
      'batch_size': batch_size,
      'examples': len(source),
      'shuffle': shuffle,
      'drop_remainder': drop_remainder,
    }
    self._end = None if epochs is None else epochs * self.steps_per_epoch
    part = batch_size // process_count
    self._part = slice(process_index * part, (process_index + 1) * part)
    self._order = functools.lru_cache(2)(
      self._shuffled
    )  # the batches ahead may be of the next epoch
    self._next = 0  # batches yielded since the first epoch began
    self._prefetch, self._ahead = prefetch, collections.deque()
    self._threads = concurrent.futures.ThreadPoolExecutor(prefetch, 'batches') if prefetch else None

  def __next__(self) -> dict[str, np.ndarray]:
    if self._next == self._end:
      raise StopIteration
    if self._threads is None:
      batch = self._batch(self._next)
    else:
      self._make_ahead()
      batch = self._ahead[0].result()
      self._ahead.popleft()
    self._next += 1
    self._make_ahead()
    return batch

  def state(self) -> dict[str, Any]:
    """Where the iteration stands, after the batch yielded last: a dict for JSON."""
    epoch, batch = divmod(self._next, self.steps_per_epoch)
    return {'epoch': epoch, 'batch': batch, **self._fixed}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes to where `state` was taken, as fast to a late position as to an early one.

    Raises:
      ValueError: it is no state, or that of batches of another source, size, seed or kind.
    """
    for name in ('epoch', 'batch', *self._fixed):
      if name not in state:
        raise ValueError(f'the state {state} has no {name!r}')
    for name, value in self._fixed.items():
      if state[name] != value:
        raise ValueError(
          f'the state was taken with {name}={state[name]}, these batches have {name}={value}'
        )
    number = state['epoch'] * self.steps_per_epoch + state['batch']
    if not 0 <= number <= (number if self._end is None else self._end):
      raise ValueError(
        f'epoch {state["epoch"]}, batch {state["batch"]} is beyond the end of these batches'
      )
    for future in self._ahead:
      future.cancel()
    self._ahead.clear()
    self._next = number

  def _make_ahead(self) -> None:
    while (
      len(self._ahead) < self._prefetch and (number := self._next + len(self._ahead)) != self._end
    ):
      self._ahead.append(self._threads.submit(self._batch, number))

  def _batch(self, number: int) -> dict[str, np.ndarray]:
    epoch, batch = divmod(number, self.steps_per_epoch)
    size = self._fixed['batch_size']
    rows = self._order(epoch)[batch * size : (batch + 1) * size]
    real = np.arange(size) < len(rows)
    rows = np.pad(rows, (0, size - len(rows)), mode='edge')
    out = _stacked([self._example(epoch, int(row)) for row in rows[self._part]])
    if self._keep_all:
      if 'mask' in out:
        raise ValueError(
          "the transform returns 'mask', which is the name of the mask over examples"
        )
      out['mask'] = real[self._part].astype(np.float32)
    return out

  def _example(self, epoch: int, row: int) -> dict[str, Any]:
    example = self._source[row]
    if self._transform is None:
      return example
    return self._transform(example, np.random.Generator(self._bits(epoch, row)))

  def _shuffled(self, epoch: int) -> np.ndarray:
    size = self._fixed['examples']
    if not self._fixed['shuffle']:
      return np.arange(size)
    # NumPy promises the raw bits across its versions, but not what Generator.permutation makes of
    # them.
    return np.argsort(self._bits(epoch).random_raw(size), kind='stable')

  def _bits(self, *place: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(self._fixed['seed'], spawn_key=place))


def _stacked(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """The arrays of the examples, stacked; numbers become int32 or float32."""
  out = {}
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
    stacked = np.stack(values)
    narrow = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}  # what JAX holds
    out[name] = stacked.astype(narrow.get(stacked.dtype, stacked.dtype), copy=False)
  return out
