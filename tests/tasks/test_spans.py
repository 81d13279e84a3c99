"""Answers in texts: the best span of windows, and SQuAD's scores by hand."""

import numpy as np
import pytest

from jpeft.tasks import spans


@pytest.mark.parametrize(
  ('answer', 'given', 'exact', 'f1'),
  [
    ('The Cat!', ['cat'], 1, 1),
    ('a black  cat', ['the black cat.'], 1, 1),
    ('black cat', ['cat'], 0, 2 / 3),
    ('cat cat', ['cat'], 0, 2 / 3),  # a word counts as often as it stands in both
    ('dog', ['cat', 'a dog'], 1, 1),  # the given answer that fits best
    ('big dog', ['cat', 'a dog'], 0, 2 / 3),
    ('', [], 1, 1),  # no answer
    ('cat', [], 0, 0),
    ('', ['cat'], 0, 0),
    ('x', ['the', 'x'], 1, 1),
    ('theatre', ['the atre'], 0, 0),  # articles are words
  ],
)
def test_scores_by_hand(answer, given, exact, f1):
  assert spans.exact(answer, given) == exact
  assert spans.f1(answer, given) == pytest.approx(f1)


def slow(windows, longest):
  """(score, start, end) of the best span, one after the other."""
  found = []
  for logits, offsets in windows:
    places = [i for i, (start, _) in enumerate(offsets) if start >= 0]
    for i in places:
      for j in places:
        if i <= j < i + longest:
          found.append((logits[i, 0] + logits[j, 1], offsets[i][0], offsets[j][1]))
  return max(found)


@pytest.mark.parametrize('longest', [1, 3, 30])
def test_the_best_span(longest):
  rng = np.random.default_rng(longest)
  for _ in range(20):
    windows = []
    for first in (0, 20):
      # A class token, a question of two, a text of eight, the end; then padding.
      text = [(first + 3 * i, first + 3 * i + 2) for i in range(8)]
      offsets = np.array([(-1, -1)] * 3 + text + [(-1, -1)])
      windows.append((rng.normal(size=(16, 2)) * 3, offsets))
    best = spans.best(windows, longest)
    score, start, end = slow(windows, longest)
    assert (best.start, best.end) == (start, end) and best.score == pytest.approx(score)
    assert best.none == pytest.approx(min(logits[0].sum() for logits, _ in windows))
    for logits, offsets in windows:
      (first,), (last,) = np.nonzero(offsets[:, 0] == start), np.nonzero(offsets[:, 1] == end)
      if len(first):
        exp = np.exp(logits[:12])  # without the padding
        both = (exp / exp.sum(0))[[first[0], last[0]], [0, 1]]
        assert best.probability == pytest.approx(both.prod())
    assert 0 < best.none_probability < 1
