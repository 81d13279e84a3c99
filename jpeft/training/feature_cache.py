"""Examples as the backbone's features of them: the backbone runs once and not once an epoch."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft import cli, data, programs
from jpeft.core import Tuned
from jpeft.programs import cut

from . import hosts


class Part(NamedTuple):
  """Examples, and the program that reads them.

  Attributes:
    source: the examples.
    transform: (example, rng) -> arrays of a batch's row; None if the examples are such arrays.
    forward: (theta, backbone, batch, key) -> logits.
    example: a batch of one empty example.
    skipped: takes in examples that cannot be read; None for an error.
  """

  source: Any
  transform: Callable | None
  forward: Callable
  example: dict[str, np.ndarray]
  skipped: data.Skipped | None = None

  def shuffled(self, rows: hosts.Rows, seed: int) -> data.Batches:
    """Batches without end, in a new order each epoch.

    Args:
      rows: those of a batch that this process makes.
      seed: of the order and of the transform.
    """
    return data.Batches(
      self.source, rows.size, self.transform, seed, skipped=self.skipped, rows=rows.here
    )

  def once(self, rows: hosts.Rows) -> Iterator[dict[str, np.ndarray]]:
    """One pass over the examples in their order, the last batch filled up.

    An example that cannot be read is a `cli.Mistake`, or has a mask of 0.

    Args:
      rows: those of a batch that this process makes.
    """
    batches = data.Batches(
      self.source,
      rows.size,
      self.transform,
      shuffle=False,
      epochs=1,
      drop_remainder=False,
      skipped=self.skipped,
      rows=rows.here,
    )
    return cli.checked(batches)


def cached(part: Part, tuned: Tuned) -> Part:
  """The same examples as features: the values that the program computes before theta comes in.

  Args:
    part: raw examples.
    tuned: from `attach`.

  Raises:
    ValueError: features cannot be stored example by example, there is nothing to store, or no room
      for it.
  """
  source = Features(part, tuned)
  return Part(source, None, source.forward, source.example, part.skipped)


class Features:
  """A source of features. `fill` computes them; until then they cannot be read.

  Attributes:
    nbytes: of all features.
    example: a batch of one empty example.
  """

  def __init__(self, part: Part, tuned: Tuned):
    self._part = part
    inputs = {name: x for name, x in part.example.items() if name != 'label'}
    self._reads = tuple(inputs)
    self._halves = cut(part.forward, tuned.shapes, tuned.backbone, inputs, jax.random.key(0))
    shapes = self._halves.features
    self._names = [f'feature_{i}' for i in range(len(shapes))]
    self._columns: dict[str, np.ndarray] = {}
    self.nbytes = len(part.source) * self._halves.nbytes
    self.example = {
      name: np.zeros((1, *x.shape), x.dtype) for name, x in zip(self._names, shapes, strict=True)
    }
    self.example['label'] = part.example['label']
    self._check_rules(tuned, inputs)
    self._check_gain(tuned, inputs)
    self._check_room()

  def _check_rules(self, tuned: Tuned, inputs: dict[str, np.ndarray]) -> None:
    """Raises a ValueError if the method needs more of a forward pass than its output."""
    key = jax.random.key(0)

    def beside(theta, backbone, batch):
      return self._part.forward(theta, backbone, batch, key, aux=True)[1]

    if tuned.has_loss or jax.eval_shape(beside, tuned.shapes, tuned.backbone, inputs):
      raise ValueError(
        f'config.data.cache_features: {" and ".join(tuned.method.names)} reads more of a forward '
        'pass than its output (losses or state of its own); leave it out'
      )

  def _check_gain(self, tuned: Tuned, inputs: dict[str, np.ndarray]) -> None:
    """Raises a ValueError if nearly all of the forward pass reads theta or a random key."""

    def flops(forward, batch) -> float:
      key = jax.random.key(0)
      return programs.flops(jax.jit(forward).trace(tuned.shapes, tuned.backbone, batch, key)).all

    whole = flops(self._part.forward, inputs)
    late = flops(self.forward, self.example)
    if late > 0.9 * whole:
      raise ValueError(
        f'config.data.cache_features: {late / whole:.0%} of the FLOPs of a forward pass come after '
        'the first trained number or the first dropout; leave it out, or set config.model.dropout=0'
      )

  def _check_room(self) -> None:
    """Raises a ValueError if the features do not fit into the free memory of the host."""
    room = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if self.nbytes > 0.8 * room:
      raise ValueError(
        f'config.data.cache_features: the features of {len(self)} examples take '
        f'{self.nbytes / 2**30:.1f} GiB, of {room / 2**30:.1f} GiB of free memory; leave it out'
      )

  def forward(self, theta, backbone, batch, key, aux=False):
    """The rest of the program, on a batch of this source."""
    features = [batch[name] for name in self._names]
    out = self._halves.second(theta, backbone, features, key)
    return (out, {}) if aux else out  # `_check_rules`: there is nothing beside it

  def fill(
    self,
    backbone,
    batch_rows: hosts.Rows,
    stop: hosts.Stop,
    made: Callable[[int], Any],
  ) -> None:
    """Computes the features; each process keeps all of them, and reads its rows alone.

    Args:
      backbone: whose features.
      batch_rows: puts a batch on its devices.
      stop: called between batches; when it returns true the rest is not computed.
      made: called with the number of examples of each batch whose features have been computed.
    """
    first = jax.jit(self._halves.first)
    done = 0
    for batch in stop.guarded(self._part.once(batch_rows)):
      if stop():
        return
      inputs = batch_rows.put({name: batch[name] for name in self._reads})
      features = hosts.fetched(first(backbone, inputs))
      rows = dict(zip(self._names, features, strict=True))
      rows |= hosts.fetched(batch_rows.put({name: batch[name] for name in ('label', 'index')}))
      size = min(batch_rows.size, len(self) - done)  # without the rows that fill up the last
      for name, x in rows.items():
        if name not in self._columns:
          self._columns[name] = np.empty((len(self), *x.shape[1:]), x.dtype)
        self._columns[name][done : done + size] = x[:size]
      done += size
      made(size)

  def __len__(self) -> int:
    return len(self._part.source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    skipped = self._part.skipped
    if skipped is not None and i in skipped:
      raise ValueError(skipped.why(i))  # it has no features
    return {name: column[i] for name, column in self._columns.items()}
