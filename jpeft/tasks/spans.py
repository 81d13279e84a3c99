"""Answers that are spans of a text: the best one, and how well it agrees with those given.

Agreement is that of SQuAD's own evaluation (arXiv:1606.05250, and 1806.03822 for questions without
an answer): case, punctuation, articles and blanks do not count; exact_match is whether the texts
are equal, f1 that of their words, each for the given answer that fits best.
"""

import collections
import operator
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


class Best(NamedTuple):
  """The best span of the windows of a question.

  Attributes:
    start, end: its first character in the text and the one after its last.
    score: the sum of its two logits.
    probability: that of its first token times that of its last, in its window.
    none: the least of the windows' sums at the class token, which stand for no answer.
    none_probability: the same product at the class token, in that window.
  """

  start: int
  end: int
  score: float
  probability: float
  none: float
  none_probability: float


def best(windows: Sequence[tuple[np.ndarray, np.ndarray]], longest: int) -> Best:
  """The span with the largest sum of logits in any window of a question.

  Args:
    windows: (logits [N, 2] that an answer starts and ends at each token, offsets [n, 2] of
      `data.Windows`) of each; n is at most N.
    longest: tokens that a span has at most.
  """
  found = [_of_window(logits, offsets, longest) for logits, offsets in windows]
  span = max(found, key=operator.attrgetter('score'))
  nothing = min(found, key=operator.attrgetter('none'))
  return span._replace(none=nothing.none, none_probability=nothing.none_probability)


def _of_window(logits: np.ndarray, offsets: np.ndarray, longest: int) -> Best:
  """The best span of one window; its score is -inf if nothing of the text is in it."""
  logits = np.asarray(logits, np.float64)[: len(offsets)]
  total = np.logaddexp.reduce(logits).sum()  # log of both softmaxes' denominators
  none = logits[0].sum()
  places = np.flatnonzero(offsets[:, 0] >= 0)  # one after the other
  if not len(places):
    return Best(0, 0, -np.inf, 0.0, none, np.exp(none - total))
  starts, ends = logits[places].T
  after = np.concatenate([ends, np.full(longest - 1, -np.inf)])
  sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(after, longest)
  first, more = np.unravel_index(sums.argmax(), sums.shape)  # [n, longest]
  score = sums.max()
  start, end = offsets[places[first], 0], offsets[places[first + more], 1]
  return Best(int(start), int(end), score, np.exp(score - total), none, np.exp(none - total))


def normalized(text: str) -> str:
  """A text without what does not count."""
  text = text.lower().translate(_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def exact(answer: str, given: Sequence[str]) -> float:
  """1 if an answer equals one of those given, else 0; none given stands for no answer, ''."""
  return float(normalized(answer) in map(normalized, _right(given)))


def f1(answer: str, given: Sequence[str]) -> float:
  """The F1 of the words of an answer, with the one given that fits best."""
  return max(_f1(normalized(answer).split(), normalized(text).split()) for text in _right(given))


def _right(given: Sequence[str]) -> list[str]:
  """The answers that count: those of which something is left; '' without any."""
  return [text for text in given if normalized(text)] or ['']


def _f1(words: list[str], others: list[str]) -> float:
  if not words or not others:
    return float(words == others)
  common = sum((collections.Counter(words) & collections.Counter(others)).values())
  return 2 * common / (len(words) + len(others))
