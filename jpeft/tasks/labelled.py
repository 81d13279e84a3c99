"""What the tasks share whose labels are of a whole input: their examples and their rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jpeft import data

from .losses import Objective
from .modality import check_example, modality_of


class Numbered:
  """A source whose examples also have their number, so that what a batch holds is known.

  An example without a label of its kind is a ValueError on reading: a loss would not see it.

  Attributes:
    classes: names of the labels.
    about: what a report says of the source; '' for nothing.
  """

  def __init__(
    self,
    source,
    check: Callable[[Any, int], str] | None = None,
    then: Callable[[Any], Any] | None = None,
  ):
    """Numbers a source.

    Args:
      source: len, [i] and `classes`.
      check: (label, number of names) -> what is wrong with it, '' if nothing; that of one class if
        left out.
      then: what is done to each label that is right; it stays as it is if left out.
    """
    self._source = source
    self._check = check or _wrong_class
    self._then = then
    self.classes = source.classes
    self.about = '; '.join(getattr(source, 'notes', ()))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    example = self._source[i]
    label = example.get('label')
    wrong = self._check(label, len(self.classes))
    if wrong:
      raise ValueError(f'example {i} has the label {label!r}; {wrong}')
    if self._then is not None:
      label = self._then(label)
    return example | {'label': label, 'index': i}


def _wrong_class(label: Any, count: int) -> str:
  if label is None or np.ndim(label) or not 0 <= label < count:
    return f'there are {count} classes, numbered from 0'
  return ''


def source(config, split: str, kind: str = 'classes') -> data.Source:
  """The examples of a split.

  Args:
    config: of the run.
    split: its name.
    kind: of labels: 'classes', 'numbers', 'sets' or 'tags'.

  Raises:
    ValueError, OSError, RuntimeError: no such data, labels of another kind, or not as many as the
      config says.
  """
  found = data.load(config.data.name, split, config.data.dir, kind)
  classes = found.classes
  if not classes:
    raise ValueError(
      f"{config.data.name} has no labels, but texts to write: set config.task='language'"
    )
  if config.model.num_classes not in (None, len(classes)):
    raise ValueError(
      f'config.model.num_classes is {config.model.num_classes}, but {config.data.name} has '
      f'{len(classes)} labels: {", ".join(classes[:10])}'
    )
  if not config.data.in_memory:
    return found
  return data.in_memory(found, skip=config.data.on_error == 'skip')


def rows(
  config,
  pretrained,
  source,
  training: bool,
  check: Callable[[Any, int], str] | None = None,
  then: Callable[[Any], Any] | None = None,
) -> tuple[Numbered, Callable]:
  """(numbered examples, the function that makes arrays of an example).

  Args:
    config: of the run.
    pretrained: the backbone.
    source: examples.
    training: whether they are trained on.
    check, then: see `Numbered`.

  Raises:
    ValueError: the data set has another modality than the backbone, or the backbone lacks what it
      needs to read it.
  """
  first = data.first_example(source, skip=config.data.on_error == 'skip')
  check_example(pretrained, first, config.data.name)
  modality = modality_of(pretrained)
  transform = modality.transform(config, pretrained, training)
  numbered = Numbered(source, check, then)
  modality.check(pretrained, numbered, transform)
  return numbered, transform


def example(config, pretrained, label: np.ndarray) -> dict[str, np.ndarray]:
  """A batch of one empty example with a label [1, ...]."""
  return modality_of(pretrained).example(config, pretrained) | {'label': label}


def several(config, pretrained, outputs: int = 1) -> dict[str, np.ndarray]:
  """A batch of one empty example whose label is so many numbers."""
  return example(config, pretrained, np.zeros((1, outputs), np.float32))


def loss_sum(
  objective: Objective, outputs: jax.Array, labels: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(the sum of the losses of a batch, the sum of their weights).

  Args:
    objective: of the task.
    outputs, labels: [B, K].
    mask: [B], 0 for rows that only fill the batch up.
  """
  weights = objective.weights(labels) * mask[:, None]
  return (objective.losses(outputs, labels) * weights).sum(), weights.sum()


def class_weights(config, count: np.ndarray, balanced: np.ndarray, classes) -> list[float] | None:
  """`loss.class_weights` as a weight a class; None where nothing is said.

  Args:
    config: of the run.
    count: [C], how many labels of each class the training split has.
    balanced: [C], what 'balanced' stands for where there are some; 1 is taken where there are none.
    classes: names of the C classes.

  Raises:
    ValueError: not as many as there are classes, or of a class that there is not.
  """
  said = config.loss.class_weights
  if said is None:
    return None
  if said == 'balanced':
    return np.where(count > 0, balanced, 1.0).tolist()
  if isinstance(said[0], (int, float)):
    if len(said) != len(classes):
      raise ValueError(
        f'config.loss.class_weights has {len(said)} weights, and {config.data.name} has '
        f'{len(classes)} classes: {", ".join(classes[:10])}'
      )
    return [float(weight) for weight in said]
  named = {str(name): float(weight) for name, weight in said}
  for name in named:
    if name not in classes:
      raise ValueError(
        f'config.loss.class_weights has the class {name!r}, and {config.data.name} has '
        f'{", ".join(classes[:10])}'
      )
  return [named.get(name, 1.0) for name in classes]
