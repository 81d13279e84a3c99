"""Labels of images or texts."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data

from . import labelled
from .labelled import Numbered
from .losses import Objective, loss, softmax
from .metrics import further_scores, requested
from .task import NO_FACTS, Answer, Facts, Task


def source(config, split: str) -> data.Source:
  """The examples of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or not as many labels as the config says.
  """
  found = labelled.source(config, split)
  if 'f1' in requested(config) and len(found.classes) != 2:
    raise ValueError(
      f"the metric 'f1' is that of two classes, and {config.data.name} has {len(found.classes)}: "
      "take 'macro_f1'"
    )
  return found


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[Numbered, Callable]:
  """(numbered examples, the function that makes arrays of an example), see `labelled.rows`."""
  return labelled.rows(config, pretrained, source, training)


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty example."""
  return labelled.example(config, pretrained, np.zeros(1, np.int32))


def facts(config, source) -> dict[str, list[float]]:
  """{'class_weights': [C]} if the loss has some.

  'balanced' is N / (C * the number of a class) of N examples, so that all classes have one sum.
  """
  if config.loss.class_weights is None:
    return {}
  labels = np.array(data.labels_of(source))
  classes = len(source.classes)
  count = np.bincount(labels, minlength=classes)
  balanced = len(labels) / (classes * np.maximum(count, 1))
  return {'class_weights': labelled.class_weights(config, count, balanced, source.classes)}


def objective(config, facts: Facts) -> Objective:
  """Softmax cross-entropy with what the section `loss` says."""
  return softmax(config.loss.label_smoothing, facts.get('class_weights'), config.loss.focal)


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


CLASSIFICATION = Task(
  source,
  rows,
  example,
  tally,
  scores,
  facts=facts,
  objective=objective,
  predicted=predicted,
  answer=answer,
  problem='single_label_classification',
)
