"""Entities of tags, by hand and as seqeval counts them."""

import random
import types

import numpy as np
import pytest

from jpeft.tasks import TASKS, entities

TAGS = ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC']


def found(words, tags=TAGS):
  """[(type, first, last)] of tags in words."""
  table = entities.scheme(tags)
  numbers = np.array([tags.index(tag) for tag in words.split()], int)
  spans = entities.entities(numbers, table)
  return [(table.types[kind], int(a), int(b)) for a, b, kind in zip(*spans, strict=True)]


@pytest.mark.parametrize(
  ('words', 'spans'),
  [
    ('O B-PER I-PER O B-LOC', [('PER', 1, 2), ('LOC', 4, 4)]),
    ('B-PER B-PER I-PER', [('PER', 0, 0), ('PER', 1, 2)]),
    ('I-PER I-PER O I-LOC', [('PER', 0, 1), ('LOC', 3, 3)]),  # IOB1
    ('B-PER I-LOC I-LOC', [('PER', 0, 0), ('LOC', 1, 2)]),  # another type begins
    ('O O', []),
  ],
)
def test_by_hand(words, spans):
  assert found(words) == spans


def test_other_schemes():
  tags = ['O', 'B-X', 'I-X', 'E-X', 'S-X', 'L-X', 'U-X']
  assert found('B-X I-X E-X S-X B-X E-X', tags) == [('X', 0, 2), ('X', 3, 3), ('X', 4, 5)]
  assert found('B-X L-X U-X U-X O', tags) == [('X', 0, 1), ('X', 2, 2), ('X', 3, 3)]
  # Without prefixes each word is one, such as a part of speech.
  assert found('NN NN VB', ['NN', 'VB']) == [('NN', 0, 0), ('NN', 1, 1), ('VB', 2, 2)]


def sentences(count, tags, seed):
  rng = random.Random(seed)
  for _ in range(count):
    yield [rng.choice(tags) for _ in range(rng.randint(1, 12))]


def rows(sentences, tags, length=14):
  """[R, N] numbers with -1 between words and behind them, as tokens of words have."""
  table = np.full((len(sentences), 2 * length), -1)
  for row, words in zip(table, sentences, strict=True):
    row[1 : 2 * len(words) : 2] = [tags.index(tag) for tag in words]
  return table


@pytest.mark.parametrize('prefixes', ['BI', 'BIES'])
def test_against_seqeval(prefixes):
  metrics = pytest.importorskip('seqeval.metrics')
  tags = ['O', *(f'{prefix}-{kind}' for kind in ('PER', 'LOC', 'ORG') for prefix in prefixes)]
  right = list(sentences(60, tags, 0))
  rng = random.Random(1)
  guessed = [
    [tag if rng.random() < 0.8 else rng.choice(tags) for tag in sentence] for sentence in right
  ]
  count = entities.counts(rows(right, tags), rows(guessed, tags), entities.scheme(tags))
  ours = entities.rates(count.sum(0))
  assert 0.2 < ours['f1'] < 0.9
  np.testing.assert_allclose(ours['f1'], metrics.f1_score(right, guessed))
  np.testing.assert_allclose(ours['precision'], metrics.precision_score(right, guessed))
  np.testing.assert_allclose(ours['recall'], metrics.recall_score(right, guessed))
  by_type = metrics.classification_report(right, guessed, output_dict=True)
  assert count[:, 0].tolist() == [by_type[kind]['support'] for kind in ('LOC', 'ORG', 'PER')]


def test_scores_of_a_tally():
  labels = np.array([[1, -1, 2, 0, -1], [3, 0, -1, -1, -1]])
  guesses = np.array([[1, 4, 2, 3, 0], [0, 0, 0, 0, 0]])
  logits = np.eye(5, dtype=np.float32)[guesses] * 20
  task = TASKS['tokens']
  tally = task.tally(logits, labels, np.array([1.0, 1.0]))
  sentences = types.SimpleNamespace(classes=TAGS)
  judged = task.judged(None, tally, sentences)
  scores = task.scores(judged)
  # There are PER at 0-1 and LOC; found are that PER and a LOC that is none.
  assert (scores['precision'], scores['recall'], scores['f1']) == (0.5, 0.5, 0.5)
  assert scores['accuracy'] == 3 / 5 and scores['loss'] == pytest.approx(2 * 20 / 5, rel=1e-4)
  assert tally['confusion'].sum() == 5 and tally['confusion'][3, 0] == 1
  assert task.by_label(judged, TAGS, {}) == {
    'LOC': {'examples': 1, 'f1': 0, 'precision': 0, 'recall': 0},
    'PER': {'examples': 1, 'f1': 1, 'precision': 1, 'recall': 1},
  }
  half = task.tally(logits, labels, np.array([1.0, 0.0]))
  assert half['confusion'].sum() == 3  # the second row only fills the batch up
