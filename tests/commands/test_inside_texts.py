"""Runs that learn what is inside a text: tags of words, answers, masked words."""

import json
import random

import pytest

from jpeft import predict, training
from jpeft.training.metrics import read_metrics


def tagged(count, seed):
  """Sentences of people and towns; a name of two words has B- and I-."""
  rng = random.Random(seed)
  people = [(('jane',), ('B-PER',)), (('bob', 'm'), ('B-PER', 'I-PER'))]
  towns = [(('rome',), ('B-LOC',)), (('oslo',), ('B-LOC',))]
  rest = [((letter,), ('O',)) for letter in 'abcdefg'] + [(('sees',), ('O',))]
  for _ in range(count):
    parts = [rng.choice(rng.choice((people, towns, rest))) for _ in range(4)]
    yield [(word, tag) for words, tags in parts for word, tag in zip(words, tags, strict=True)]


@pytest.fixture(scope='module')
def sentences(tmp_path_factory):
  """A folder of columns."""
  folder = tmp_path_factory.mktemp('sentences')
  for split, count in (('train', 64), ('test', 20)):
    lines = []
    for sentence in tagged(count, len(split)):
      lines += [*(f'{word} NN {tag}' for word, tag in sentence), '']
    (folder / f'{split}.txt').write_text('\n'.join(['-DOCSTART- -X- O', '', *lines]))
  return folder


@pytest.fixture(scope='module')
def tagger(inside, sentences, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tagger') / 'run'
  training.train(inside('tokens', f'conll:{sentences}'), folder)
  return folder


def scores(folder):
  """(first, last) evaluation of a run."""
  rows = [row for row in read_metrics(folder / 'metrics.jsonl') if row['split'] == 'test']
  return rows[0], rows[-1]


def losses(folder):
  rows = [row for row in read_metrics(folder / 'metrics.jsonl') if row['split'] == 'train']
  return [row['loss'] for row in rows]


def lines_of(capsys):
  return capsys.readouterr().out.splitlines()


def test_tags_are_learned_and_told(tagger, tmp_path, capsys):
  _, last = scores(tagger)
  assert last['f1'] > 0.95 and last['accuracy'] > 0.95
  assert losses(tagger)[-1] < 0.3 * losses(tagger)[0]
  report = (tagger / 'report.md').read_text()
  assert 'best: f1' in report and 'B-PER' in report
  (tmp_path / 'lines.txt').write_text('bob m sees rome\n')
  capsys.readouterr()
  command = ['--run', str(tagger), '--input', str(tmp_path / 'lines.txt')]
  predict.main(command)
  assert lines_of(capsys) == ['bob m sees rome\tB-PER I-PER O B-LOC']
  predict.main([*command, '--json'])
  (line,) = lines_of(capsys)
  told = json.loads(line)
  assert told['entities'] == [
    {'type': 'PER', 'first': 0, 'last': 1, 'text': 'bob m'},
    {'type': 'LOC', 'first': 3, 'last': 3, 'text': 'rome'},
  ]
  assert told['words'] == ['bob', 'm', 'sees', 'rome'] and min(told['probabilities']) > 0.5


def asked(count, seed, answered=1.0):
  """Questions on lists of letters in which one town stands, which is the answer."""
  rng = random.Random(seed)
  for i in range(count):
    words = rng.choices('abcdefg', k=14)
    answers = []
    if rng.random() < answered:
      place = rng.randrange(14)
      words[place] = rng.choice(['rome', 'oslo'])
      start = len(' '.join(words[:place])) + bool(place)
      answers = [{'text': words[place], 'answer_start': start}]
    yield {'id': str(i), 'question': 'in ?', 'context': ' '.join(words), 'answers': answers}


def of_squad(file, questions):
  paragraphs = [
    {'context': one['context'], 'qas': [{**one, 'is_impossible': not one['answers']}]}
    for one in questions
  ]
  file.write_text(json.dumps({'version': '2.0', 'data': [{'paragraphs': paragraphs}]}))


@pytest.fixture(scope='module')
def squad(tmp_path_factory):
  """A folder of files of SQuAD 2.0."""
  folder = tmp_path_factory.mktemp('squad')
  of_squad(folder / 'train.json', asked(64, 1, 0.7))
  of_squad(folder / 'test.json', asked(20, 2, 0.7))
  return folder


def test_answers_are_found(inside, squad, tmp_path, capsys):
  run = tmp_path / 'run'
  # A row has room for ten tokens of the text: two windows or three.
  training.train(inside('questions', f'squad:{squad}', **{'eval.no_answer': 0.0}), run)
  _, last = scores(run)
  assert last['f1'] > 0.9 and last['exact_match'] > 0.9
  assert last['no_answer_accuracy'] > 0.6 and last['answered_f1'] > 0.8
  assert losses(run)[-1] < 0.3 * losses(run)[0]
  lines = [
    {'question': 'in ?', 'context': 'a b c d e f g a b c d  rome e f g'},
    {'question': 'in ?', 'context': 'a b c d e'},
  ]
  (tmp_path / 'asked.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  capsys.readouterr()
  predict.main(['--run', str(run), '--input', str(tmp_path / 'asked.jsonl'), '--json'])
  first, second = map(json.loads, lines_of(capsys))
  assert (first['input'], first['answer']) == ('in ?', 'rome')
  assert lines[0]['context'][first['start'] : first['end']] == 'rome'
  assert 0.05 < first['probability'] < 1
  assert (second['answer'], second['start'], second['end']) == ('', None, None)
  predict.main(['--run', str(run), '--input', str(tmp_path / 'asked.jsonl')])
  assert lines_of(capsys)[0] == f'in ?\trome\t{first["probability"]:.4f}'


@pytest.fixture(scope='module')
def echoes(tmp_path_factory):
  """A folder of plain texts, each of which says one word."""
  folder = tmp_path_factory.mktemp('echoes')
  rng = random.Random(0)
  for split, count in (('train', 64), ('test', 24)):
    lines = [' '.join([rng.choice('abcdef')] * rng.randint(6, 12)) for _ in range(count)]
    (folder / f'{split}.txt').write_text('\n'.join(lines))
  return folder


def test_masked_words_are_named(inside, echoes, tmp_path, capsys):
  run = tmp_path / 'run'
  training.train(inside('masked', f'text:{echoes}'), run)
  (untuned,) = [row for row in read_metrics(run / 'metrics.jsonl') if row['split'] == 'untuned']
  _, last = scores(run)
  assert last['accuracy'] > 0.6 > untuned['accuracy']
  assert last['perplexity'] < 0.2 * untuned['perplexity']
  (tmp_path / 'lines.txt').write_text('a a [MASK] a a a\nd [MASK] d d [MASK] d\n')
  capsys.readouterr()
  predict.main(['--run', str(run), '--input', str(tmp_path / 'lines.txt'), '--json'])
  first, second = map(json.loads, lines_of(capsys))
  assert first['masks'][0][0]['word'] == 'a' and len(first['masks'][0]) == 5
  assert [words[0]['word'] for words in second['masks']] == ['d', 'd']
