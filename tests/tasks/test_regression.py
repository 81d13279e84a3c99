"""Scores of numbers against scikit-learn and scipy, and their units."""

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

import jpeft
from jpeft import config
from jpeft.tasks import REGRESSION
from jpeft.tasks import metrics as own_metrics

VALUES = {
  'task': 'regression',
  'model': {'source': 'x'},
  'data': {'name': 'mine'},
  'method': {'name': 'lora'},
  'steps': 1,
}


class Source(list):
  def __init__(self, labels, classes):
    super().__init__({'label': label} for label in labels)
    self.classes = classes


def tally_of(outputs, labels, size=7):
  """The tally of several batches, as an evaluation sums it."""
  total = None
  for start in range(0, len(labels), size):
    mask = np.ones(len(labels[start : start + size]))
    one = REGRESSION.tally(outputs[start : start + size], labels[start : start + size], mask)
    one = {name: np.asarray(x) for name, x in one.items()}
    if total is None:
      total = one
      continue
    for name, x in one.items():
      kept = name in REGRESSION.kept
      total[name] = np.concatenate([total[name], x]) if kept else total[name] + x
  return total


@pytest.mark.parametrize('seed', range(3))
def test_scores_are_exact_and_in_the_units_of_the_data(seed):
  rng = np.random.default_rng(seed)
  facts = {'mean': [100.0, -3.0], 'deviation': [20.0, 0.5]}
  labels = rng.normal(size=(50, 2)).round(1).astype(np.float32)  # with equal ones
  outputs = (labels + rng.normal(size=(50, 2))).round(1).astype(np.float32)
  found = REGRESSION.scores(tally_of(outputs, labels), (), facts)
  true, told = (np.float64(x) * facts['deviation'] + facts['mean'] for x in (labels, outputs))
  expected = {
    'mse': metrics.mean_squared_error(true, told),
    'rmse': metrics.root_mean_squared_error(true, told),
    'mae': metrics.mean_absolute_error(true, told),
    'r2': metrics.r2_score(true, told),
    'pearson': np.mean([scipy.stats.pearsonr(true[:, i], told[:, i])[0] for i in range(2)]),
    'spearman': np.mean([scipy.stats.spearmanr(true[:, i], told[:, i])[0] for i in range(2)]),
    'loss': ((labels - outputs) ** 2).mean(),
  }
  assert found == pytest.approx(expected)


def test_missing_numbers_are_left_out():
  labels = np.array([[1, np.nan], [2, 5], [4, 7]], np.float32)
  outputs = np.array([[1, 99], [2, 5], [3, 8]], np.float32)
  found = REGRESSION.scores(tally_of(outputs, labels, 2))
  assert found['mse'] == pytest.approx((1 / 3 + 1 / 2) / 2)
  assert found['loss'] == pytest.approx(2 / 5)


def test_what_is_undefined_is_nothing():
  labels = np.ones((3, 1), np.float32)
  found = REGRESSION.scores(tally_of(labels + 1, labels))
  assert (found['r2'], found['pearson'], found['spearman']) == (0, 0, 0) and found['mse'] == 1


def test_mean_and_deviation_are_those_of_the_training_split():
  whole = config.complete(VALUES)
  labels = [[1.0, 5.0], [2.0, np.nan], [6.0, 7.0]]
  found = REGRESSION.facts(whole, Source(labels, ['a', 'b']))
  np.testing.assert_allclose(found['mean'], [3, 6])
  np.testing.assert_allclose(found['deviation'], [np.std([1, 2, 6]), 1])
  plain = config.complete({**VALUES, 'loss': {'standardize': False}})
  assert REGRESSION.facts(plain, Source(labels, ['a', 'b'])) == {}
  with pytest.raises(ValueError, match="'a' is 3 everywhere in 'train' of mine: there is nothing"):
    REGRESSION.facts(whole, Source([3.0, 3.0], ['a']))


def test_predictions_are_in_the_units_of_the_data():
  facts = {'mean': [100.0], 'deviation': [20.0]}
  row = np.asarray(REGRESSION.predicted(np.array([[0.5]], np.float32), {}, facts))[0]
  told = REGRESSION.answer(row, {}, ['score'], facts)
  assert told.columns == ('110',) and told.values == {'values': {'score': 110.0}}


def test_a_metric_from_outside_reads_the_units_of_the_data(monkeypatch):
  monkeypatch.setattr(own_metrics, 'METRICS', dict(own_metrics.METRICS))

  def largest_miss(tally):
    return np.abs(tally['prediction'] - tally['label']).max()

  jpeft.register_metric('largest_miss', largest_miss, task='regression', lower_is_better=True)
  labels = np.array([[0.0], [1.0]], np.float32)
  outputs = np.array([[0.5], [1.25]], np.float32)
  found = REGRESSION.scores(tally_of(outputs, labels), (), {'mean': [7.0], 'deviation': [10.0]})
  assert found['largest_miss'] == 5
  chosen = config.complete({**VALUES, 'eval': {'metric': 'largest_miss'}})
  assert chosen.eval.metric == 'largest_miss'
  assert config.complete(VALUES).eval.metric == 'mse'
  with pytest.raises(ValueError, match="'accuracy' is no metric of config.task='regression'"):
    config.complete({**VALUES, 'eval': {'metric': 'accuracy'}})
