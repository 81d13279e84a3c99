"""Sets of classes for images or texts: each class is there or not, by itself.

A class is predicted where its probability is at least 0.5. Scores of classes are means over those
that can have one; what is not known of an example does not count.

    average precision    the mean of the precisions at each rank of a right example, weighed by the
                         recall it adds; equal probabilities share a rank
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data

from . import labelled
from .losses import Objective, sigmoid
from .metrics import further_scores
from .task import NO_FACTS, Answer, Facts, Task


def source(config, split: str) -> data.Source:
  """The examples of a split, with sets of classes for labels, see `labelled.source`."""
  return labelled.source(config, split, 'sets')


def facts(config, source) -> dict[str, list[float]]:
  """{'class_weights': [C]} if the loss has some.

  'balanced' is how many times as often a class is not there as it is.
  """
  if config.loss.class_weights is None:
    return {}
  labels = np.array(data.labels_of(source))
  ones = (labels == 1).sum(0)
  balanced = (labels == 0).sum(0) / np.maximum(ones, 1)
  # A class that every example has would weigh nothing.
  balanced = np.where(balanced > 0, balanced, 1.0)
  return {'class_weights': labelled.class_weights(config, ones, balanced, source.classes)}


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[labelled.Numbered, Callable]:
  """(numbered examples, the function that makes arrays of an example), see `labelled.rows`."""
  return labelled.rows(config, pretrained, source, training, _wrong, _as_array)


def _wrong(label: Any, count: int) -> str:
  """What is wrong with a label, if anything."""
  try:
    found = np.asarray(label, np.float32)
  except (TypeError, ValueError):
    found = np.zeros(0)
  if found.shape != (count,) or not (np.isin(found, (0, 1)) | np.isnan(found)).all():
    return f'it must be 1, 0 or NaN (not known) for each of {count} classes'
  return ''


def _as_array(label: Any) -> np.ndarray:
  return np.asarray(label, np.float32)


def objective(config, facts: Facts) -> Objective:
  """Sigmoid cross-entropy with what the section `loss` says."""
  return sigmoid(facts.get('class_weights'), config.loss.focal)


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over a batch, and the logits themselves, whose order is scored.

  Args:
    logits: [B, C].
    labels: [B, C], 1, 0, or NaN where it is not known.
    mask: [B], 0 for rows that only fill the batch up.

  Returns:
    loss: a sum over examples and classes; known: how many of these there are; logit, label: [B, C],
    kept.
  """
  loss, known = labelled.loss_sum(sigmoid(), logits, labels, mask)
  return {
    'loss': loss,
    'known': known,
    'logit': logits.astype(jnp.float32),
    'label': labels,
  }


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """mean_average_precision, macro_f1, micro_f1, subset_accuracy, loss, and registered metrics.

  mean_average_precision is over the classes that some example has, macro_f1 over those that some
  example has or that are predicted. subset_accuracy is the share of examples of which all that is
  known is predicted. What is undefined is 0.
  """
  logits = np.asarray(tally['logit'], np.float64)
  labels = np.asarray(tally['label'])
  known = ~np.isnan(labels)
  has = known & (labels == 1)
  said = known & (logits >= 0)
  hits = (has & said).sum(0)
  either = has.sum(0) + said.sum(0)
  occurs = either > 0
  precisions = [
    average_precision(has[rows, c], logits[rows, c])
    for c, rows in enumerate(known.T)
    if has[:, c].any()
  ]
  own = {
    'mean_average_precision': float(np.mean(precisions)) if precisions else 0.0,
    'macro_f1': float(np.mean(2 * hits[occurs] / either[occurs])) if occurs.any() else 0.0,
    'micro_f1': float(2 * hits.sum() / either.sum()) if occurs.any() else 0.0,
    'subset_accuracy': float((has == said).all(1).mean()),
    'loss': float(tally['loss'] / tally['known']),
  }
  return own | further_scores('multilabel', tally, names)


def by_label(
  tally: dict[str, np.ndarray], labels: Sequence[str], facts: Facts
) -> dict[str, dict[str, float]]:
  """How many examples have each class, and its precision, recall, F1 and average precision."""
  found = {}
  for name, logits, column in zip(labels, tally['logit'].T, tally['label'].T, strict=True):
    known = ~np.isnan(column)
    has = column[known] == 1
    said = logits[known] >= 0
    hits = int((has & said).sum())
    found[name] = {
      'examples': int(has.sum()),
      'precision': _ratio(hits, said.sum()),
      'recall': _ratio(hits, has.sum()),
      'f1': _ratio(2 * hits, has.sum() + said.sum()),
      'average_precision': average_precision(has, logits[known]) if has.any() else 0.0,
    }
  return found


def _ratio(part: float, whole: float) -> float:
  return float(part / whole) if whole else 0.0


def average_precision(has: np.ndarray, order: np.ndarray) -> float:
  """The average precision of one class.

  Args:
    has: [N] bool, which examples have it; some do.
    order: [N], larger for those that rather have it.
  """
  _, which = np.unique(-order, return_inverse=True)  # the rank of each, from 0 for the largest
  count = np.bincount(which)
  hits = np.bincount(which, weights=has)
  precision = np.cumsum(hits) / np.cumsum(count)
  return float(precision @ hits / hits.sum())


def predicted(logits: jax.Array, batch, facts: Facts) -> jax.Array:
  """The probability of each class [B, C], in float32."""
  return jax.nn.sigmoid(logits.astype(jnp.float32))


def answer(row: np.ndarray, example: dict, labels: Sequence[str], facts: Facts) -> Answer:
  """The classes whose probability is at least 0.5, the likeliest first, and those of all."""
  probabilities = dict(zip(labels, map(float, row), strict=True))
  found = sorted(
    (name for name in labels if probabilities[name] >= 0.5), key=lambda name: -probabilities[name]
  )
  columns = tuple(f'{name} {probabilities[name]:.4f}' for name in found) or ('-',)
  return Answer(columns, {'labels': found, 'probabilities': probabilities})


MULTILABEL = Task(
  source,
  rows,
  labelled.several,
  tally,
  scores,
  by_label=by_label,
  facts=facts,
  objective=objective,
  kept=('logit', 'label'),
  predicted=predicted,
  answer=answer,
  problem='multi_label_classification',
)
