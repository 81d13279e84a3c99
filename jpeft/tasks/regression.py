"""Numbers for images or texts: one, or several of an input.

The head learns numbers that are standardised, (label - mean) / deviation of the training split, so
that learning rates of other tasks do. Scores and predictions are in the units of the data.

    r2          1 - squared distance / spread of the labels
    pearson     the correlation of labels and predictions
    spearman    that of their ranks, equal values having the mean of their ranks

Of several numbers each score is the mean of those of the single ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data

from . import labelled
from .losses import Objective, distance
from .metrics import further_scores
from .task import NO_FACTS, Answer, Facts, Task


def source(config, split: str) -> data.Source:
  """The examples of a split, with numbers for labels, see `labelled.source`."""
  return labelled.source(config, split, 'numbers')


def facts(config, source) -> dict[str, list[float]]:
  """{'mean': [K], 'deviation': [K]} of the training split; nothing where labels stay as they are.

  Raises:
    ValueError: a number that is nowhere, or everywhere the same.
  """
  labels = np.array(data.labels_of(source), np.float64).reshape(len(source), -1)
  for name, column in zip(source.classes, labels.T, strict=True):
    values = np.unique(column[~np.isnan(column)])
    if len(values) < 2:
      there = f'{values[0]:g} everywhere' if len(values) else 'missing everywhere'
      raise ValueError(
        f'{name!r} is {there} in {config.data.train!r} of {config.data.name}: there is nothing to '
        'learn'
      )
  if not config.loss.standardize:
    return {}
  return {
    'mean': np.nanmean(labels, 0).tolist(),
    'deviation': np.nanstd(labels, 0).tolist(),
  }


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[labelled.Numbered, Callable]:
  """(numbered examples with standardised labels, the function that makes arrays of an example)."""

  def standardised(label: Any) -> np.ndarray:
    mean, deviation = _units(facts)
    return ((np.asarray(label, np.float64) - mean) / deviation).reshape(-1).astype(np.float32)

  return labelled.rows(config, pretrained, source, training, _wrong, standardised)


def _wrong(label: Any, count: int) -> str:
  """What is wrong with a label, if anything."""
  found = np.asarray(label)
  if found.dtype.kind not in 'fiu' or found.size != count:
    return 'it must be a number' if count == 1 else f'it must be {count} numbers'
  if np.isinf(found).any() or np.isnan(found).all():
    return 'no number of it is finite'
  return ''


def units(facts: Facts) -> tuple[np.ndarray, np.ndarray] | None:
  """(mean, deviation) if the head learned standardised numbers."""
  return _units(facts) if facts else None


def _units(facts: Facts) -> tuple[np.ndarray, np.ndarray]:
  """(mean, deviation) of what the head learns, in the units of the data."""
  return np.asarray(facts.get('mean', 0.0)), np.asarray(facts.get('deviation', 1.0))


def objective(config, facts: Facts) -> Objective:
  """The distance that `loss.name` names, in units of the deviation."""
  return distance(config.loss.name or 'mse')


def tally(outputs: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over a batch, and the numbers themselves, which ranks are of.

  Args:
    outputs: [B, K].
    labels: [B, K], NaN where a number is missing.
    mask: [B], 0 for rows that only fill the batch up.

  Returns:
    loss: the sum of squared distances, in units of the deviation; numbers: how many there are;
    prediction, label: [B, K], kept.
  """
  loss, numbers = labelled.loss_sum(distance('mse'), outputs, labels, mask)
  return {
    'loss': loss,
    'numbers': numbers,
    'prediction': outputs.astype(jnp.float32),
    'label': labels,
  }


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """mse, rmse, mae, r2, pearson, spearman in the units of the data, and the loss.

  The loss is the mean squared distance in units of the deviation of the training split.
  """
  whole = _in_units(tally, facts)
  columns = [column for column in _of_each(whole) if column]
  own = {name: float(np.mean([column[name] for column in columns])) for name in columns[0]}
  own['loss'] = float(tally['loss'] / tally['numbers'])
  return own | further_scores('regression', whole, names)


def _in_units(tally: dict[str, np.ndarray], facts: Facts) -> dict[str, np.ndarray]:
  """The tally with predictions and labels in the units of the data."""
  mean, deviation = _units(facts)
  return tally | {
    'prediction': np.asarray(tally['prediction'], np.float64) * deviation + mean,
    'label': np.asarray(tally['label'], np.float64) * deviation + mean,
  }


def _of_each(whole: dict[str, np.ndarray]) -> list[dict[str, float]]:
  """The scores of each number, {} for one that is missing everywhere."""
  found = []
  for label, prediction in zip(whole['label'].T, whole['prediction'].T, strict=True):
    there = ~np.isnan(label)
    found.append(_of_one(label[there], prediction[there]) if there.any() else {})
  return found


def by_label(
  tally: dict[str, np.ndarray], labels: Sequence[str], facts: Facts
) -> dict[str, dict[str, float]]:
  """The scores of each of several numbers; {} of a single one, whose scores are those of all."""
  if len(labels) == 1:
    return {}
  found = zip(labels, _of_each(_in_units(tally, facts)), strict=True)
  return {
    label: {name: float(value) for name, value in scores.items()}
    for label, scores in found
    if scores
  }


def _of_one(label: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
  """The scores of one number, of examples that all have it; what is undefined is 0."""
  difference = prediction - label
  mse = np.mean(difference**2)
  spread = np.var(label)
  return {
    'mse': mse,
    'rmse': np.sqrt(mse),
    'mae': np.mean(np.abs(difference)),
    'r2': 1 - mse / spread if spread else 0.0,
    'pearson': _correlation(label, prediction),
    'spearman': _correlation(_ranks(label), _ranks(prediction)),
  }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  a = a - a.mean()
  b = b - b.mean()
  spread = np.sqrt((a @ a) * (b @ b))
  return a @ b / spread if spread else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
  """The rank of each value, from 1; equal values have the mean of their ranks."""
  _, which, count = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(count) - (count - 1) / 2)[which]


def predicted(outputs: jax.Array, batch, facts: Facts) -> jax.Array:
  """The numbers [B, K] in the units of the data, in float32."""
  mean, deviation = _units(facts)
  return outputs.astype(jnp.float32) * deviation + mean


def answer(row: np.ndarray, example: dict, labels: Sequence[str], facts: Facts) -> Answer:
  """The numbers by name."""
  values = dict(zip(labels, map(float, row), strict=True))
  return Answer(tuple(f'{value:.6g}' for value in values.values()), {'values': values})


REGRESSION = Task(
  source,
  rows,
  labelled.several,
  tally,
  scores,
  by_label=by_label,
  usual=1,
  facts=facts,
  objective=objective,
  kept=('prediction', 'label'),
  predicted=predicted,
  answer=answer,
  units=units,
  problem='regression',
)
