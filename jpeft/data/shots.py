"""A few examples of each class of a split."""

import dataclasses

import numpy as np

from .labels import labels_of
from .source import Source


def few_shots(source: Source, shots: int, seed: int) -> Source:
  """A split with the same number of examples of each class, drawn by a seed.

  Which examples of a class are drawn depends on the seed, on the class and on how many it has.

  Args:
    source: whose labels are numbers of classes.
    shots: examples of each class.
    seed: at least 0.

  Raises:
    ValueError: a class has fewer examples.
  """
  labels = np.array(labels_of(source))
  drawn: list[int] = []
  for number, name in enumerate(source.classes):
    own = np.flatnonzero(labels == number)
    if len(own) < shots:
      raise ValueError(
        f'{shots} examples of each class are asked for, and the split has {len(own)} of {name!r}'
      )
    rng = np.random.default_rng((seed, number))
    drawn += sorted(rng.choice(own, shots, replace=False).tolist())
  told = f'{shots} of each class, drawn by seed {seed}'
  rows = [source.rows[i] for i in drawn]
  return dataclasses.replace(source, rows=rows, notes=(*source.notes, told))
