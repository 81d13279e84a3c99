"""Metrics from outside jpeft, and which evaluation is best."""

import numpy as np
import pytest

import jpeft
from jpeft import config, tasks
from jpeft.tasks import metrics

TALLY = {'loss': np.float32(6.0), 'confusion': np.array([[3, 1], [0, 4]])}
VALUES = {
  'model': {'source': 'x'},
  'data': {'name': 'folder:x'},
  'method': {'name': 'lora'},
  'steps': 1,
}


def worst_class(tally):
  """The accuracy of the class that is recognized worst."""
  confusion = np.asarray(tally['confusion'])
  return (np.diag(confusion) / confusion.sum(1)).min()


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setattr(metrics, 'METRICS', dict(metrics.METRICS))
  jpeft.register_metric('worst_class', worst_class)
  jpeft.register_metric('surprise', lambda tally: 1.0, task='language', lower_is_better=True)


def test_it_is_computed_beside_those_of_the_task(registered):
  scores = tasks.CLASSIFICATION.scores(TALLY)
  assert scores == {
    'accuracy': 7 / 8,
    'macro_f1': pytest.approx((6 / 7 + 8 / 9) / 2),
    'loss': 0.75,
    'worst_class': 0.75,
  }
  language = tasks.LANGUAGE.scores({'loss': 2.0, 'right': 1, 'tokens': 2})
  assert language['surprise'] == 1.0 and language['accuracy'] == 0.5


def test_a_config_may_choose_the_best_theta_by_it(registered):
  chosen = config.complete({**VALUES, 'eval': {'metric': 'worst_class'}})
  assert chosen.eval.metric == 'worst_class'
  with pytest.raises(ValueError, match='config.eval.metric must be one of accuracy'):
    config.complete({**VALUES, 'eval': {'metric': 'worst_clas'}})


def test_the_best_is_the_least_where_lower_is_better(registered):
  rows = [{'worst_class': 0.2, 'surprise': 0.2}, {'worst_class': 0.4, 'surprise': 0.4}]
  assert tasks.best('worst_class', rows) is rows[1]
  assert tasks.best('surprise', rows) is rows[0]
  assert tasks.best('loss', [{'loss': 2.0}, {'loss': 1.0}]) == {'loss': 1.0}


def test_it_says_where_it_came_from(registered):
  assert tasks.registered_module('worst_class') == __name__
  assert tasks.registered_module('accuracy') is None


@pytest.mark.parametrize(
  ('name', 'task', 'message'),
  (
    ('accuracy', 'classification', "'accuracy' is a metric of jpeft"),
    ('mine', 'retrieval', "task='retrieval' must be 'classification' or 'language'"),
  ),
)
def test_what_cannot_be_registered(name, task, message):
  with pytest.raises(ValueError, match=message):
    jpeft.register_metric(name, worst_class, task=task)
