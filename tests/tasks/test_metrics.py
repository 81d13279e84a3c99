"""Metrics from outside jpeft, and which evaluation is best."""

import numpy as np
import pytest
import scipy.stats

import jpeft
from jpeft import config, tasks
from jpeft.tasks import agreement, metrics

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


@pytest.mark.parametrize('classes', [2, 4])
@pytest.mark.parametrize('seed', range(3))
def test_scores_on_request_against_the_examples_themselves(classes, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, 60)
  guesses = np.where(rng.random(60) < 0.6, labels, rng.integers(0, classes, 60))
  confusion = np.zeros((classes + 1, classes + 1))  # the last class never occurs
  np.add.at(confusion, (labels, guesses), 1)
  names = ('balanced_accuracy', 'matthews', 'pearson', 'spearman')
  found = tasks.CLASSIFICATION.scores({'loss': 1.0, 'confusion': confusion}, names)

  assert found['balanced_accuracy'] == pytest.approx(
    np.mean([(guesses[labels == label] == label).mean() for label in range(classes)])
  )
  assert found['pearson'] == pytest.approx(scipy.stats.pearsonr(labels, guesses)[0])
  assert found['spearman'] == pytest.approx(scipy.stats.spearmanr(labels, guesses)[0])
  # R_K is the covariance of the indicators, summed over classes, over both spreads.
  true, told = (np.eye(classes)[x] - np.eye(classes)[x].mean(0) for x in (labels, guesses))
  spread = np.sqrt((true * true).sum() * (told * told).sum())
  assert found['matthews'] == pytest.approx((true * told).sum() / spread)
  if classes == 2:
    assert found['matthews'] == pytest.approx(np.corrcoef(labels, guesses)[0, 1])
    precision = labels[guesses == 1].mean()
    recall = guesses[labels == 1].mean()
    pair = {'confusion': confusion[:2, :2]}
    assert agreement.f1(pair) == pytest.approx(2 / (1 / precision + 1 / recall))


def test_what_is_undefined_is_nothing():
  one = {'loss': 1.0, 'confusion': np.array([[5, 0], [0, 0]])}
  names = ('f1', 'balanced_accuracy', 'matthews', 'pearson', 'spearman')
  found = tasks.CLASSIFICATION.scores(one, names)
  assert {name: found[name] for name in names} == {
    **dict.fromkeys(names, 0.0),
    'balanced_accuracy': 1.0,
  }


def test_a_config_may_ask_for_more():
  asked = config.complete({**VALUES, 'eval': {'metric': 'matthews', 'also': ('f1', 'spearman')}})
  assert tasks.requested(asked) == ('matthews', 'f1', 'spearman')
  for also in (('f2',), ('accuracy',)):
    with pytest.raises(ValueError, match='config.eval.also must be some of f1, balanced_accuracy'):
      config.complete({**VALUES, 'eval': {'also': also}})
  with pytest.raises(ValueError, match="config.eval.also='f1' is no metric of config.task='lang"):
    config.complete({**VALUES, 'task': 'language', 'eval': {'metric': 'loss', 'also': ('f1',)}})


def test_a_config_may_choose_the_best_theta_by_it(registered):
  chosen = config.complete({**VALUES, 'eval': {'metric': 'worst_class'}})
  assert chosen.eval.metric == 'worst_class'
  with pytest.raises(ValueError, match="'surprise' is no metric of config.task='classification'"):
    config.complete({**VALUES, 'eval': {'metric': 'surprise'}})
  with pytest.raises(ValueError, match='config.eval.metric must be one of accuracy'):
    config.complete({**VALUES, 'eval': {'metric': 'worst_clas'}})


def test_the_best_is_the_least_where_lower_is_better(registered):
  rows = [{'worst_class': 0.2, 'surprise': 0.2}, {'worst_class': 0.4, 'surprise': 0.4}]
  assert tasks.best('worst_class', rows) is rows[1]
  assert tasks.best('surprise', rows) is rows[0]
  assert tasks.best('loss', [{'loss': 2.0}, {'loss': 1.0}]) == {'loss': 1.0}


def test_how_long_nothing_was_better():
  rows = [{'loss': value} for value in (3.0, 1.0, 1.0, 2.0)]
  assert [tasks.stale('loss', rows[:count]) for count in range(5)] == [0, 0, 0, 1, 2]
  assert tasks.stale('accuracy', [{'accuracy': 0.5}] * 3) == 2


def test_it_says_where_it_came_from(registered):
  assert tasks.registered_module('worst_class') == __name__
  assert tasks.registered_module('accuracy') is None


@pytest.mark.parametrize(
  ('name', 'task', 'message'),
  (
    ('accuracy', 'classification', "'accuracy' is a metric of jpeft"),
    ('matthews', 'classification', "'matthews' is a metric of jpeft"),
    ('mine', 'retrieval', "task='retrieval' must be 'classification', 'multilabel'"),
  ),
)
def test_what_cannot_be_registered(name, task, message):
  with pytest.raises(ValueError, match=message):
    jpeft.register_metric(name, worst_class, task=task)
