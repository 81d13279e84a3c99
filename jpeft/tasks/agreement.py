"""Scores of how predictions agree with labels, from a confusion matrix [C, C].

Rows are labels, columns predictions, entries counts. What is undefined, such as the F1 of a class
that neither occurs nor is predicted, is 0.

    matthews    R_K of Gorodkin (2004), which for two classes is Matthews' coefficient (1975)
    spearman    the correlation of ranks, equal values having the mean of their ranks
"""

from collections.abc import Mapping

import numpy as np

Tally = Mapping[str, object]


def f1(tally: Tally) -> float:
  """The F1 of the second of two classes."""
  (_, false), (missed, hits) = _confusion(tally)
  return _ratio(2 * hits, 2 * hits + false + missed)


def balanced_accuracy(tally: Tally) -> float:
  """The mean of the accuracies of the classes that occur."""
  confusion = _confusion(tally)
  count = confusion.sum(1)
  occurs = count > 0
  return float((np.diag(confusion)[occurs] / count[occurs]).mean())


def matthews(tally: Tally) -> float:
  """Matthews' correlation coefficient, of any number of classes."""
  confusion = _confusion(tally)
  total = confusion.sum()
  labels = confusion.sum(1)
  predictions = confusion.sum(0)
  covariance = np.trace(confusion) * total - labels @ predictions
  spread = (total**2 - predictions @ predictions) * (total**2 - labels @ labels)
  return _ratio(covariance, np.sqrt(spread))


def pearson(tally: Tally) -> float:
  """The correlation of label and prediction as numbers 0, 1, ..., for classes in an order."""
  confusion = _confusion(tally)
  numbers = np.arange(len(confusion), dtype=np.float64)
  return _correlation(confusion, numbers, numbers)


def spearman(tally: Tally) -> float:
  """The correlation of the ranks of label and prediction, for classes in an order."""
  confusion = _confusion(tally)
  return _correlation(confusion, _ranks(confusion.sum(1)), _ranks(confusion.sum(0)))


def _confusion(tally: Tally) -> np.ndarray:
  return np.asarray(tally['confusion'], np.float64)


def _ratio(part: float, whole: float) -> float:
  return float(part / whole) if whole else 0.0


def _ranks(count: np.ndarray) -> np.ndarray:
  """The mean rank, from 1, of the examples of each class.

  Args:
    count: examples of each class.
  """
  return np.cumsum(count) - (count - 1) / 2


def _correlation(weights: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
  """The correlation of two numbers, given how often each pair of their values occurs.

  Args:
    weights: [C, C], counts of pairs.
    rows: [C], the values of the first number.
    columns: [C], the values of the second.
  """
  weights = weights / weights.sum()
  rows = rows - weights.sum(1) @ rows
  columns = columns - weights.sum(0) @ columns
  spread = (weights.sum(1) @ rows**2) * (weights.sum(0) @ columns**2)
  return _ratio(rows @ weights @ columns, np.sqrt(spread))
