"""Labels of images or texts."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data

from .losses import loss
from .metrics import further_scores, requested
from .modality import check_example, modality_of
from .task import NO_FACTS, Answer, Facts, Task


class Numbered:
  """A source whose examples also have their number, so that what a batch holds is known.

  An example without a label of its classes is a ValueError on reading: a loss would not see it.
  """

  def __init__(self, source):
    self._source = source
    self.classes = source.classes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    example = self._source[i]
    label = example.get('label')
    if label is None or not 0 <= label < len(self.classes):
      raise ValueError(
        f'example {i} has the label {label!r}; there are {len(self.classes)} classes, numbered '
        'from 0'
      )
    return example | {'index': i}


def source(config, split: str) -> data.Source:
  """The examples of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or not as many labels as the config says.
  """
  found = data.load(config.data.name, split, config.data.dir)
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
  if 'f1' in requested(config) and len(classes) != 2:
    raise ValueError(
      f"the metric 'f1' is that of two classes, and {config.data.name} has {len(classes)}: take "
      "'macro_f1'"
    )
  return data.in_memory(found) if config.data.in_memory else found


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[Numbered, Callable]:
  """(numbered examples, the function that makes arrays of an example).

  Raises:
    ValueError: the data set has another modality than the backbone, or the backbone lacks what it
      needs to read it.
  """
  check_example(pretrained, source[0], config.data.name)
  modality = modality_of(pretrained)
  transform = modality.transform(config, pretrained, training)
  numbered = Numbered(source)
  modality.check(pretrained, numbered, transform)
  return numbered, transform


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty example."""
  arrays = modality_of(pretrained).example(config, pretrained)
  return arrays | {'label': np.zeros(1, np.int32)}


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over the examples of a batch.

  Args:
    logits: [B, C].
    labels: [B] integers.
    mask: [B], 0 for rows that only fill the batch up.

  Returns:
    loss: a scalar; confusion: [C, C] counts by label and prediction.
  """
  classes = logits.shape[-1]
  kept = mask.astype(jnp.float32)
  true = jax.nn.one_hot(labels, classes)
  predicted = jax.nn.one_hot(logits.argmax(-1), classes)
  confusion = jnp.einsum('bt,bp,b->tp', true, predicted, kept)
  return {'loss': (loss(logits, labels) * kept).sum(), 'confusion': confusion}


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """accuracy, macro_f1 (over the labels that occur or are predicted) and loss of a summed tally.

  Beside these, the metrics that are named or were registered.
  """
  confusion = np.asarray(tally['confusion'], np.float64)
  hits = np.diag(confusion)
  total = confusion.sum()
  # Twice the hits over (label's examples + its predictions) is the F1 of a label.
  either = confusion.sum(0) + confusion.sum(1)
  occurs = either > 0
  f1 = 2 * hits[occurs] / either[occurs]
  own = {
    'accuracy': float(hits.sum() / total),
    'macro_f1': float(f1.mean()),
    'loss': float(tally['loss'] / total),
  }
  return own | further_scores('classification', tally, names)


def predicted(logits: jax.Array, batch, facts: Facts) -> jax.Array:
  """The probability of each class [B, C], in float32."""
  return jax.nn.softmax(logits.astype(jnp.float32))


def answer(row: np.ndarray, example: dict, labels: Sequence[str], facts: Facts) -> Answer:
  """The likeliest class, its probability, and those of all."""
  label = labels[row.argmax()]
  probability = float(row.max())
  values = {
    'label': label,
    'probability': probability,
    'probabilities': dict(zip(labels, map(float, row), strict=True)),
  }
  return Answer((label, f'{probability:.4f}'), values)


CLASSIFICATION = Task(source, rows, example, tally, scores, predicted=predicted, answer=answer)
