"""Objectives against the same losses in plain numpy, and what training makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax
from sklearn.utils.class_weight import compute_class_weight

from jpeft import config, data, tasks
from jpeft.tasks import CLASSIFICATION, MULTILABEL, losses

VALUES = {
  'model': {'source': 'x'},
  'data': {'name': 'mine'},
  'method': {'name': 'lora'},
  'steps': 1,
}


def configured(task='classification', **loss):
  return config.complete({**VALUES, 'task': task, 'loss': loss})


def mean_of(objective, outputs, labels):
  """The loss of a batch, as an update computes it."""
  return objective.sum(outputs, labels) / objective.weights(labels).sum()


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
@pytest.mark.parametrize('weights', [None, (0.5, 2.0, 3.0)])
def test_softmax_with_weights_and_focal(gamma, weights):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(20, 3)).astype(np.float32)
  labels = rng.integers(-1, 3, 20)
  learned = labels >= 0
  log = log_softmax(logits.astype(np.float64), -1)[np.arange(20), labels]
  of_each = (1 - np.exp(log)) ** gamma * -log
  weight = np.ones(20) if weights is None else np.array(weights)[labels]
  # As torch.nn.CrossEntropyLoss(weight=, ignore_index=-1): over the sum of the weights.
  expected = (of_each * weight)[learned].sum() / weight[learned].sum()
  objective = tasks.softmax(class_weights=weights, focal=gamma)
  np.testing.assert_allclose(mean_of(objective, logits, labels), expected, rtol=1e-5)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
@pytest.mark.parametrize('weights', [None, (0.5, 2.0, 3.0)])
def test_sigmoid_with_weights_and_focal(gamma, weights):
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(20, 3)).astype(np.float32)
  labels = rng.choice([0, 1, np.nan], (20, 3)).astype(np.float32)
  p = expit(logits.astype(np.float64))
  positive = (1 - p) ** gamma * -np.log(p) * (1 if weights is None else np.array(weights))
  negative = p**gamma * -np.log(1 - p)
  # As torch.nn.BCEWithLogitsLoss(pos_weight=), over what is known.
  expected = np.where(labels == 1, positive, negative)[~np.isnan(labels)].mean()
  objective = losses.sigmoid(weights, gamma)
  np.testing.assert_allclose(mean_of(objective, logits, labels), expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['mse', 'mae', 'huber'])
def test_distances(name):
  outputs = np.array([[0.5, -3.0], [2.0, 0.0]], np.float32)
  labels = np.array([[0.0, 1.0], [np.nan, -1.0]], np.float32)
  d = np.array([0.5, 4.0, 1.0])
  expected = {'mse': (d**2).mean(), 'mae': d.mean(), 'huber': (0.125 + 3.5 + 0.5) / 3}[name]
  np.testing.assert_allclose(mean_of(losses.distance(name), outputs, labels), expected, rtol=1e-6)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_gradients_stay_finite_where_all_is_right_or_wrong(gamma):
  extreme = jnp.array([[200.0, -200.0], [-200.0, 200.0]])
  of_classes = tasks.softmax(focal=gamma)
  of_sets = losses.sigmoid(focal=gamma)
  labels = jnp.array([[1.0, jnp.nan], [1.0, 0.0]])
  for gradient in (
    jax.grad(of_classes.sum)(extreme, jnp.array([0, 0])),
    jax.grad(of_sets.sum)(extreme, labels),
    jax.grad(losses.distance('huber').sum)(extreme, labels),
  ):
    assert np.isfinite(gradient).all()
  unknown = jax.grad(of_sets.sum)(extreme, labels)[0, 1]
  assert unknown == 0


class Source(list):
  def __init__(self, labels, classes):
    super().__init__({'label': label} for label in labels)
    self.classes = classes


def test_balanced_classes_are_those_of_scikit_learn():
  labels = [0, 0, 0, 2, 2, 1]
  found = CLASSIFICATION.facts(configured(class_weights='balanced'), Source(labels, list('abc')))
  expected = compute_class_weight('balanced', classes=np.arange(3), y=labels)
  np.testing.assert_allclose(found['class_weights'], expected)
  absent = CLASSIFICATION.facts(configured(class_weights='balanced'), Source([0, 0], list('ab')))
  assert absent['class_weights'] == [0.5, 1.0]


def test_balanced_sets_give_both_sides_of_a_class_one_weight():
  labels = [[1, 0, 0], [0, 0, 0], [0, np.nan, 1], [0, 0, 0]]
  found = MULTILABEL.facts(
    configured('multilabel', class_weights='balanced'), Source(labels, list('abc'))
  )
  assert found['class_weights'] == [3.0, 1.0, 3.0]  # nothing has the second class


def test_weights_by_name_or_in_order():
  source = Source([0, 1, 2], ['cat', 'dog', '7'])
  for said in ((1, 3.0, 2), {'dog': 3, 7: 2}, (('dog', 3.0), ('7', 2.0))):
    found = CLASSIFICATION.facts(configured(class_weights=said), source)
    assert found['class_weights'] == [1.0, 3.0, 2.0]
  with pytest.raises(ValueError, match='has 2 weights, and mine has 3 classes: cat, dog, 7'):
    CLASSIFICATION.facts(configured(class_weights=(1, 2)), source)
  with pytest.raises(ValueError, match="class_weights has the class 'cow', and mine has cat, dog"):
    CLASSIFICATION.facts(configured(class_weights={'cow': 2}), source)


@pytest.mark.parametrize('said', ['equal', (1, 0), (-1, 2), (('a', 'b'),), (), (1, float('inf'))])
def test_weights_that_are_none(said):
  with pytest.raises(ValueError, match="config.loss.class_weights must be 'balanced', numbers"):
    configured(class_weights=said)


@pytest.mark.parametrize(
  ('task', 'loss', 'message'),
  [
    ('regression', {'class_weights': 'balanced'}, 'it is for classification and multilabel'),
    ('regression', {'focal': 2.0}, 'config.loss.focal=2.0 says nothing to the loss of .*regress'),
    ('language', {'focal': 2.0}, "says nothing to the loss of config.task='language'"),
    ('multilabel', {'label_smoothing': 0.1}, 'it is for classification and language'),
    ('classification', {'name': 'mae'}, "config.loss.name='mae' says .*; it is for regression"),
    ('classification', {'standardize': False}, 'it is for regression'),
    ('classification', {'focal': 1.0, 'label_smoothing': 0.1}, 'give one'),
  ],
)
def test_what_a_loss_does_not_read_is_refused(task, loss, message):
  with pytest.raises(ValueError, match=message):
    configured(task, **loss)


def test_labels_are_counted_without_reading_examples():
  def read(row):
    raise AssertionError('an example was read')

  source = data.Source(read, (2, 0), ['a'], label_of=[5, 6, 7].__getitem__)
  assert data.labels_of(source) == [7, 5]


def test_distances_of_outputs():
  """Of classes and sets the divergence of probabilities, of numbers what their loss is."""
  out, told = np.random.default_rng(2).normal(size=(2, 4, 3)).astype(np.float32)
  labels = np.array([0, 2, -1, 1])
  chance = np.exp(log_softmax(told, -1))
  each = (chance * (log_softmax(told, -1) - log_softmax(out, -1))).sum(-1)
  found = losses.softmax(class_weights=(1.0, 2.0, 3.0)).distance(out, told, labels)
  np.testing.assert_allclose(found, each[0] + 3 * each[1] + 2 * each[3], rtol=1e-5)
  sets = np.array([[1, 0, 0], [np.nan, 1, 1], [0, 0, np.nan], [0, 1, 1]])
  p, q = expit(told), expit(out)
  each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
  found = losses.sigmoid().distance(out, told, sets)
  np.testing.assert_allclose(found, np.where(np.isnan(sets), 0, each).sum(), rtol=1e-4)
  found = losses.distance('mae').distance(out, told, sets)
  np.testing.assert_allclose(
    found, np.where(np.isnan(sets), 0, np.abs(out - told)).sum(), rtol=1e-5
  )
  with pytest.raises(ValueError, match='does not say how far two outputs are apart'):
    tasks.Objective(losses.loss, None, losses.known).distance(out, told, labels)
