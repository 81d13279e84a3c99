"""BLEU, chrF and ROUGE against their definitions."""

import functools
import math
import sys
from collections import Counter

import pytest

from jpeft import cli, config, decoding, training
from jpeft.tasks import likeness
from jpeft.training import evaluating, run

TEXTS = ['the cat sat on the mat today', 'a dog ran in the park again', 'it is cold']
WANTED = ['the cat sat on the old mat today', 'one dog ran in the park', 'it was very cold']


def runs(items, n):
  return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(texts, wanted):
  """Papineni et al. (2002), of a corpus."""
  logs = 0.0
  for n in range(1, 5):
    pairs = [(runs(a.split(), n), runs(b.split(), n)) for a, b in zip(texts, wanted, strict=True)]
    logs += math.log(sum((a & b).total() for a, b in pairs) / sum(a.total() for a, _ in pairs)) / 4
  made, right = (sum(len(text.split()) for text in side) for side in (texts, wanted))
  return 100 * math.exp(logs + min(0, 1 - right / made))


def chrf(texts, wanted):
  """Popovic (2015), of a corpus: F of recall twice as heavy, of runs of 1 to 6 characters."""
  scores = []
  for n in range(1, 7):
    pairs = [
      (runs(a.replace(' ', ''), n), runs(b.replace(' ', ''), n))
      for a, b in zip(texts, wanted, strict=True)
    ]
    both = sum((a & b).total() for a, b in pairs)
    scores.append([both / sum(pair[side].total() for pair in pairs) for side in (0, 1)])
  precision, recall = (sum(score[side] for score in scores) / 6 for side in (0, 1))
  return 100 * 5 * precision * recall / (4 * precision + recall)


def rouge(texts, wanted, n):
  """Lin (2004): the mean F1 of runs of n words."""
  found = []
  for text, right in zip(texts, wanted, strict=True):
    a, b = runs(text.split(), n), runs(right.split(), n)
    found.append(2 * (a & b).total() / (a.total() + b.total()))
  return sum(found) / len(found)


def test_against_their_definitions():
  pytest.importorskip('sacrebleu')
  pytest.importorskip('rouge_score')
  names = likeness.asked_for(('rouge2', 'bleu', 'rouge1', 'rougeL', 'chrf', 'accuracy'))
  assert names == ('bleu', 'chrf', 'rouge1', 'rouge2', 'rougeL')
  found = likeness.scores(names, TEXTS, WANTED)
  assert found['bleu'] == pytest.approx(bleu(TEXTS, WANTED))
  assert found['chrf'] == pytest.approx(chrf(TEXTS, WANTED))
  assert found['rouge1'] == pytest.approx(rouge(TEXTS, WANTED, 1))
  assert found['rouge2'] == pytest.approx(rouge(TEXTS, WANTED, 2))
  # Longest common subsequences of 7, 5 and 2 words.
  assert found['rougeL'] == pytest.approx((14 / 15 + 10 / 13 + 4 / 7) / 3)
  assert likeness.scores((), TEXTS, WANTED) == {}


def test_a_run_scores_and_counts_what_it_writes(language, tmp_path, monkeypatch, capsys):
  pytest.importorskip('sacrebleu')
  pytest.importorskip('rouge_score')
  for module in (decoding, evaluating):
    monkeypatch.setattr(module, 'AT_ONCE', 2)
  monkeypatch.setattr(run, 'Progress', functools.partial(training.Progress, every=0))
  also = ('chrf', 'rouge1', 'rougeL')
  changes = {'method.name': 'full', 'optimizer.lr': 1e-2, 'eval.generate': 5, 'eval.also': also}
  told = training.train(language(**changes, **{'steps': 60, 'eval.every': 60}), tmp_path)
  assert set(told['eval']) == {
    *('perplexity', 'loss', 'accuracy', 'exact_match', 'word_error_rate'),
    *also,
  }
  # Letters written backwards: one word is right in each text that is not exact.
  assert 0.5 <= told['eval']['exact_match'] <= told['eval']['rouge1'] <= 1
  assert told['untuned']['chrf'] < told['eval']['chrf'] <= 100
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('writing')]
  assert [line.split()[1] for line in lines] == 2 * ['2/5', '4/5', '5/5']
  assert 'left' not in lines[0] and lines[1].endswith(' left')


def test_what_cannot_be_scored(language, tmp_path):
  with pytest.raises(ValueError, match='say how many by config.eval.generate'):
    language(**{'method.name': 'lora', 'steps': 1, 'eval.also': ('bleu',)})
  with pytest.raises(ValueError, match="'f1' is no metric of config.task='language'"):
    language(**{'method.name': 'lora', 'steps': 1, 'eval.also': ('f1',)})
  values = {'model.source': 'x', 'data.name': 'csv:x', 'method.name': 'lora', 'steps': 1}
  with pytest.raises(ValueError, match="'bleu' is no metric of config.task='classification'"):
    config.complete(config.nest({**values, 'eval.also': ('bleu',)}))
  pytest.importorskip('rouge_score')
  likeness.check_readable(('chrf',), ['καλά'])
  with pytest.raises(ValueError, match="rougeL reads the letters a to z .* example 1 .* 'καλά'"):
    likeness.check_readable(('chrf', 'rougeL'), ['a', 'καλά'])


def test_a_missing_package_is_told_before_training(language, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
  changes = {'eval.generate': 2, 'eval.also': ('bleu',), 'method.name': 'lora', 'steps': 1}
  with pytest.raises(cli.Mistake, match=r"pip install 'jpeft\[scores\]'"):
    training.train(language(**changes), tmp_path / 'run')
