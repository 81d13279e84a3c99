"""Scores of sets of classes against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from jpeft.tasks import MULTILABEL


def tally_of(logits, labels):
  one = MULTILABEL.tally(logits, labels, np.ones(len(labels)))
  return {name: np.asarray(x) for name, x in one.items()}


@pytest.mark.parametrize('seed', range(3))
def test_scores_are_those_of_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  labels = (rng.random((60, 4)) < (0.1, 0.3, 0.5, 0.0)).astype(np.float32)  # the last has none
  logits = (3 * labels - 1 + 2 * rng.normal(size=labels.shape)).round(1).astype(np.float32)
  logits[:, 3] = -1  # and is never predicted
  found = MULTILABEL.scores(tally_of(logits, labels))
  guesses = (logits >= 0).astype(int)
  own = labels[:, :3]
  assert found == pytest.approx(
    {
      'mean_average_precision': metrics.average_precision_score(
        own, logits[:, :3], average='macro'
      ),
      'macro_f1': metrics.f1_score(labels, guesses, average='macro', zero_division=np.nan),
      'micro_f1': metrics.f1_score(labels, guesses, average='micro'),
      'subset_accuracy': metrics.accuracy_score(labels, guesses),
      'loss': np.mean(np.logaddexp(0, logits) - labels * logits),
    }
  )


def test_each_class_by_itself():
  labels = np.array([[1, 0], [1, np.nan], [0, 0]], np.float32)
  logits = np.array([[1.0, 1.0], [-1.0, 5.0], [2.0, -1.0]], np.float32)
  found = MULTILABEL.by_label(tally_of(logits, labels), ['a', 'b'], {})
  assert found['a'] == pytest.approx(
    {
      'examples': 2,
      'precision': 0.5,
      'recall': 0.5,
      'f1': 0.5,
      'average_precision': metrics.average_precision_score([1, 1, 0], [1, -1, 2]),
    }
  )
  assert set(found['b'].values()) == {0}


def test_what_is_not_known_does_not_count():
  labels = np.array([[1, np.nan], [0, 1], [np.nan, 0]], np.float32)
  logits = np.array([[2.0, 9.0], [-1.0, 1.0], [5.0, -2.0]], np.float32)
  found = MULTILABEL.scores(tally_of(logits, labels))
  assert found['subset_accuracy'] == found['macro_f1'] == found['mean_average_precision'] == 1
  assert found['loss'] == pytest.approx(np.mean(np.logaddexp(0, [-2.0, -1.0, -1.0, -2.0])))


def test_nothing_to_find():
  labels = np.zeros((2, 2), np.float32)
  found = MULTILABEL.scores(tally_of(labels - 1, labels))
  assert found['mean_average_precision'] == found['macro_f1'] == found['micro_f1'] == 0
  assert found['subset_accuracy'] == 1


def test_an_answer_has_the_likeliest_first():
  told = MULTILABEL.answer(np.array([0.6, 0.1, 0.9]), {}, ['a', 'b', 'c'], {})
  assert told.columns == ('c 0.9000', 'a 0.6000')
  assert told.values == {'labels': ['c', 'a'], 'probabilities': {'a': 0.6, 'b': 0.1, 'c': 0.9}}
  assert MULTILABEL.answer(np.array([0.2]), {}, ['a'], {}).columns == ('-',)
