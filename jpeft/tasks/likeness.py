"""Scores of texts beside the texts that were asked for, by the packages that papers report.

bleu      sacrebleu (1804.08771): of the whole set, 0 to 100; words in runs of up to four, so
          that sets of shorter texts have 0
chrf      sacrebleu: the same of runs of up to six characters
rouge1, rouge2, rougeL    rouge-score: the mean of the F1 of each text, 0 to 1, of words, pairs
          of words, and the longest common subsequence; it reads a to z and digits alone
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jpeft.config import TEXT_METRICS
from jpeft.lazy import extra

_ROUGE = ('rouge1', 'rouge2', 'rougeL')


def asked_for(names: Sequence[str]) -> tuple[str, ...]:
  """The scores of this module among the metrics that a configuration names.

  Raises:
    ImportError: the package of one is not installed; it names the extra.
  """
  found = tuple(name for name in TEXT_METRICS if name in names)
  for name in found:
    if name in _ROUGE:
      _rouge([name])
    else:
      _sacrebleu()
  return found


def check_readable(names: Sequence[str], wanted: Sequence[str]) -> None:
  """Raises a ValueError if a text is asked for in which ROUGE would see nothing.

  Args:
    names: from `asked_for`.
    wanted: the texts.
  """
  chosen = [name for name in names if name in _ROUGE]
  if not chosen:
    return
  with extra('scores'):
    from rouge_score import tokenizers
  tokenize = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize  # that of RougeScorer
  for i, text in enumerate(wanted):
    if text.strip() and not tokenize(text):
      raise ValueError(
        f'{chosen[0]} reads the letters a to z and digits alone, and example {i} of the test split '
        f"asks for {text[:40]!r}: take 'chrf'"
      )


def scores(names: Sequence[str], texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """{name: score}.

  Args:
    names: from `asked_for`.
    texts: that a model has written.
    wanted: the text that was asked for in place of each.
  """
  found: dict[str, float] = {}
  rouge = [name for name in names if name in _ROUGE]
  each = []
  if rouge:
    scorer = _rouge(rouge)
    each = [scorer.score(right, text) for text, right in zip(texts, wanted, strict=True)]
  for name in names:
    if name in _ROUGE:
      found[name] = float(np.mean([score[name].fmeasure for score in each]))
    else:
      kinds = {'bleu': _sacrebleu().BLEU, 'chrf': _sacrebleu().CHRF}
      found[name] = float(kinds[name]().corpus_score(list(texts), [list(wanted)]).score)
  return found


def _sacrebleu() -> Any:
  with extra('scores'):
    import sacrebleu.metrics
  return sacrebleu.metrics


def _rouge(names: Sequence[str]) -> Any:
  with extra('scores'):
    from rouge_score import rouge_scorer
  return rouge_scorer.RougeScorer(list(names))
