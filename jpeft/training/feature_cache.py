"""Examples as the backbone's features of them, so that the backbone runs once and not once an
epoch.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft import data, programs
from jpeft.core import Tuned
from jpeft.programs import cut


class Part(NamedTuple):
  """Examples, and the program that reads them.

  Attributes:
    source: the examples.
    transform: (example, rng) -> arrays of a batch's row; None where they are that already.
    forward: (theta, backbone, batch, key) -> logits.
    blank: a batch of one empty example.
  """

  source: Any
  transform: Callable | None
  forward: Callable
  blank: dict[str, np.ndarray]

  def once(self, batch_size: int) -> data.Batches:
    """One pass over the examples in their order, filled up."""
    return data.Batches(
      self.source, batch_size, self.transform, shuffle=False, epochs=1, drop_remainder=False
    )


def cached(part: Part, tuned: Tuned, batch_size: int) -> Part:
  """The same examples as features: what the program computes before theta comes in.

  Args:
    part: raw examples.
    tuned: whose theta it is.
    batch_size: in which the features are computed.

  Raises:
    ValueError: features cannot be kept example by example, there is nothing to keep, or no room for
      it.
  """
  source = Features(part, tuned, batch_size)
  return Part(source, None, source.forward, source.blank)


class Features:
  """A source of features. `fill` computes them; until then they cannot be read.

  Attributes:
    nbytes: of all features.
    blank: a batch of one empty example.
  """

  def __init__(self, part: Part, tuned: Tuned, batch_size: int):
    inputs = {k: v for k, v in part.blank.items() if k != 'label'}
    self._halves = cut(part.forward, tuned.shapes, tuned.backbone, inputs, jax.random.key(0))
    self._part, self._batch_size, self._reads = part, batch_size, tuple(inputs)
    crossing = self._halves.features
    self._names = [f'feature_{i}' for i in range(len(crossing))]
    self.nbytes = len(part.source) * self._halves.nbytes
    self.blank = {
      name: np.zeros((1, *x.shape), x.dtype) for name, x in zip(self._names, crossing, strict=True)
    }
    self.blank['label'] = part.blank['label']
    self._columns: dict[str, np.ndarray] = {}
    abstract = tuned.shapes, tuned.backbone
    whole, late = (
      programs.flops(jax.jit(fn).trace(*abstract, batch, jax.random.key(0))).all
      for fn, batch in ((part.forward, inputs), (self.forward, self.blank))
    )
    if late > 0.9 * whole:
      raise ValueError(
        f'config.data.cache_features: {late / whole:.0%} of the FLOPs of a forward pass come after the '
        'first trained number or the first dropout; leave it out, or set config.model.dropout=0'
      )
    room = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if self.nbytes > 0.8 * room:
      raise ValueError(
        f'config.data.cache_features: the features of {len(part.source)} examples take '
        f'{self.nbytes / 2**30:.1f} GiB, of {room / 2**30:.1f} GiB of free memory; leave it out'
      )

  def forward(self, theta, backbone, batch, key):
    """The program on a batch of this source."""
    return self._halves.second(theta, backbone, [batch[name] for name in self._names], key)

  def fill(self, backbone, put: Callable[[Any], Any], stop: Callable[[], Any]) -> None:
    """Computes the features.

    Args:
      backbone: whose features.
      put: puts a batch on its devices.
      stop: asked between batches; when true the rest stays undone.
    """
    first, done = jax.jit(self._halves.first), 0
    for batch in self._part.once(self._batch_size):
      if stop():
        return
      found = jax.device_get(first(backbone, put({name: batch[name] for name in self._reads})))
      rows = {
        **dict(zip(self._names, found, strict=True)),
        'label': batch['label'],
        'index': batch['index'],
      }
      size = min(len(batch['label']), len(self) - done)
      for name, x in rows.items():
        if name not in self._columns:
          self._columns[name] = np.empty((len(self), *x.shape[1:]), x.dtype)
        self._columns[name][done : done + size] = x[:size]
      done += size

  def __len__(self) -> int:
    return len(self._part.source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {name: column[i] for name, column in self._columns.items()}
