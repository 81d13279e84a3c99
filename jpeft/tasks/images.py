"""What the tasks share that learn from images alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jpeft import data

from . import labelled
from .losses import Objective, known
from .modality import IMAGE, modality_of
from .task import NO_FACTS, Facts
from .texts import check_entries, check_unlabelled


def source(config, split: str) -> data.Source:
  """The images of a split; labels that they may have are left out.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or data without images.
  """
  found = data.load(config.data.name, split, config.data.dir, 'nothing')
  check_entries(config, found, ('image',))
  check_unlabelled(config)
  found = dataclasses.replace(found, classes=[])
  if not config.data.in_memory:
    return found
  return data.in_memory(found, skip=config.data.on_error == 'skip')


def _nothing_wrong(label: Any, count: int) -> str:
  return ''


def _zero(label: Any) -> int:
  return 0


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[labelled.Numbered, Callable]:
  """(images with the label 0, the function that makes arrays of one).

  Raises:
    ValueError: the backbone does not read images.
  """
  _check_reads(config, pretrained)
  return labelled.rows(config, pretrained, source, training, _nothing_wrong, _zero)


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty image.

  Raises:
    ValueError: the backbone does not read images.
  """
  _check_reads(config, pretrained)
  return labelled.example(config, pretrained, np.zeros(1, np.int32))


def _check_reads(config, pretrained) -> None:
  modality = modality_of(pretrained)
  if modality.name != IMAGE.name:
    raise ValueError(
      f'config.task={config.task!r} reads images, and {config.model.source} the modality '
      f'{modality.name!r}'
    )


def check(config, tuned) -> None:
  """Raises a ValueError where features are to be cached: each step hides or crops anew."""
  if config.data.cache_features:
    raise ValueError(
      f'config.data.cache_features: config.task={config.task!r} shows the backbone other parts of '
      'an image at each step; leave it out'
    )


def no_outputs(labels) -> int:
  """That there is no head."""
  return 0


def losses(outputs, labels):
  """[B], which the task's parts have made."""
  return outputs['losses']


def objective(config, facts: Facts) -> Objective:
  """The mean of the losses that the task's parts make."""
  return Objective(losses, None, known)


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """The mean loss, from its sum over images."""
  return {'loss': float(tally['loss'] / tally['images'])}


def not_merged(t, site, arrays) -> dict:
  """The `merge` of parts of a task: nothing of them is in merged weights."""
  return {}
