"""Runs that learn what is inside a text: tags of words, answers, masked words."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest

from jpeft import cli, merge, models, plan, predict, tasks, training
from jpeft.training.metrics import read_metrics
from jpeft.training.watch import Watch


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
  assert 'best: f1' in report and '## Labels, at step 60' in report and '| PER' in report
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


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_masks(inside, echoes, tmp_path, monkeypatch):
  """Of a method without a head of its own: the word table names the words."""
  settings = inside(
    'masked',
    f'text:{echoes}',
    **{'steps': 11, 'eval.every': 11, 'checkpoint.every': 4, 'method.name': 'lora'},
    **{'log.every': 1, 'data.batch_size': 32},  # two batches an epoch
  )
  assert settings.method.head is False
  training.train(settings, tmp_path / 'alone')
  add = Watch.add

  def killed(self, number, *rest):
    add(self, number, *rest)
    if number == 6:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(Watch, 'add', killed)
    with pytest.raises(cli.Stopped):
      training.train(settings, tmp_path / 'stopped')
  training.train(settings, tmp_path / 'stopped')
  first, second = (
    [{**row, 'time': None} for row in read_metrics(tmp_path / name / 'metrics.jsonl')]
    for name in ('alone', 'stopped')
  )
  assert first == second
  theta = [(tmp_path / name / 'theta.safetensors') for name in ('alone', 'stopped')]
  loaded = [training.checkpoints.read_theta(file)[0] for file in theta]
  for path, x in loaded[0].items():
    assert x.tobytes() == loaded[1][path].tobytes()


def test_large_logits_of_masked_words_are_not_made_whole(
  inside, echoes, tmp_path, monkeypatch, capsys
):
  settings = inside('masked', f'text:{echoes}', **{'steps': 3, 'log.every': 1})
  whole = training.train(settings, tmp_path / 'whole')
  monkeypatch.setattr(tasks, 'MOST_LOGITS', 1)
  cut = training.train(settings, tmp_path / 'cut')
  assert 'made whole' not in capsys.readouterr().err
  np.testing.assert_allclose(losses(tmp_path / 'whole'), losses(tmp_path / 'cut'), rtol=1e-4)
  for name, value in whole['eval'].items():
    np.testing.assert_allclose(cut['eval'][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_cached_features_and_two_devices_give_the_same_answers(inside, squad, tmp_path):
  changes = {'steps': 4, 'method.name': 'linear', 'eval.no_answer': 0.0}
  told = []
  for more in ({}, {'data.cache_features': True}, {'mesh.data': 2, 'optimizer.accumulate': 2}):
    settings = inside('questions', f'squad:{squad}', **changes, **more)
    told.append(training.train(settings, tmp_path / str(len(told)))['eval'])
  for other in told[1:]:
    for name, value in told[0].items():
      np.testing.assert_allclose(other[name], value, rtol=1e-4)


def test_plans_of_each(inside, sentences, capsys, encoder, tmp_path):
  file = tmp_path / 'own.py'
  for task, name in (
    ('tokens', f'conll:{sentences}'),
    ('questions', 'squad:none'),
    ('masked', 'text:none'),
  ):
    values = inside(task, name).to_dict()
    values['method'] = {'name': 'lora'}
    file.write_text(f'def get_config():\n  return {values!r}\n')
    plan.main([f'--config={file}', '--target=cpu', '--json'])
    (row,) = json.loads(capsys.readouterr().out)
    assert row['method'] == 'lora' and row['batch'] == 8 and row['trainable'] > 1000


@pytest.mark.parametrize(
  ('task', 'architecture'),
  [
    ('tokens', 'BertForTokenClassification'),
    ('questions', 'BertForQuestionAnswering'),
    ('masked', 'BertForMaskedLM'),
  ],
)
def test_merged_weights_compute_the_same(
  inside, sentences, squad, echoes, tmp_path, capsys, task, architecture
):
  names = {
    'tokens': f'conll:{sentences}',
    'questions': f'squad:{squad}',
    'masked': f'text:{echoes}',
  }
  changes = {'steps': 1, 'method.name': 'lora', 'eval.no_answer': 0.0}
  training.train(inside(task, names[task], **changes), tmp_path / 'run')
  capsys.readouterr()
  merge.main(['--run', str(tmp_path / 'run'), '--out', str(tmp_path / 'out')])
  difference = float(lines_of(capsys)[0].split()[-2])
  assert difference < 1e-5
  config = models.load(tmp_path / 'out').config
  assert config['architectures'] == [architecture]
  assert (task == 'tokens') == ('B-LOC' in config.get('id2label', {}).values())


def broken(folder, **files):
  folder.mkdir()
  for name, text in files.items():
    (folder / name.replace('_', '.')).write_text(text)
  return folder


@pytest.mark.parametrize(
  ('task', 'name', 'changes', 'message'),
  [
    ('tokens', 'conll:{data}?tags=7', {}, r'line 1 of .*a\.txt has 3 columns, .* \(tags=7\)'),
    ('tokens', 'csv:{data}', {}, "csv:PATH is not read for config.task='tokens'"),
    ('tokens', 'conll:{data}', {'model.num_classes': 3}, 'num_classes is 3, but .* has 2 labels'),
    ('tokens', 'conll:{data}', {'model.source': '{vit}'}, "a vit model has no head 'tokens'"),
    (
      'questions',
      'squad:{data}/a.json',
      {},
      "question 'x' of .*a.json: the answer 'b' does not stand at answer_start=0",
    ),
    ('questions', 'squad:{data}/b.json', {}, 'has no answer: set config.eval.no_answer=0.0'),
    (
      'questions',
      'squad:{data}/b.json',
      {'eval.no_answer': 0.0, 'data.stride': 12},
      "the question 'a' leaves less room for its text than the 12 tokens",
    ),
    ('masked', 'text:{data}', {'model.source': '{decoder}'}, "a llama model has no head 'masked'"),
    ('masked', 'text:{data}', {'model.source': '{maskless}'}, 'has no token for a masked word'),
    ('masked', 'text:{data}', {'model.source': '{tagger}'}, "has no head 'masked'"),
    ('masked', 'text:{data}', {'model.num_classes': 3}, "config.task='masked' has no labels"),
    ('masked', 'text:{data}', {'data.max_length': 64}, '64, more than the 32 positions'),
  ],
)
def test_mistakes_are_told_before_training(
  inside, encoder, decoder, backbone, tmp_path, task, name, changes, message
):
  answer = {'question': 'a', 'id': 'x', 'answers': [{'text': 'b', 'answer_start': 0}]}
  of = lambda qas: json.dumps({'data': [{'paragraphs': [{'context': 'a b', 'qas': [qas]}]}]})
  folder = broken(
    tmp_path / 'data',
    a_txt='a X O\nb X B-X\n',
    a_json=of(answer),
    b_json=of(answer | {'answers': []}),
  )
  maskless = shutil.copytree(encoder, tmp_path / 'maskless')
  tokenizer = (encoder / 'tokenizer.json').read_text().replace('[MASK]', '[OTHER]')
  (maskless / 'tokenizer.json').write_text(tokenizer)
  tagger = shutil.copytree(encoder, tmp_path / 'tagger')
  model = models.load(encoder, head='tokens', num_classes=2)
  models.save_pretrained(tagger, model.model, model.variables, model.config)
  places = {'data': folder, 'vit': backbone, 'decoder': decoder}
  places |= {'maskless': maskless, 'tagger': tagger}
  chosen = {'data.train': 'train+test' if '.json' in name else 'a'}
  for key, value in changes.items():
    chosen[key] = value.format(**places) if isinstance(value, str) else value
  chosen['data.test'] = chosen['data.train']
  settings = inside(task, name.format(**places), **chosen)
  with pytest.raises(cli.Mistake, match=message):
    training.train(settings, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_inputs_that_cannot_be_answered(tagger, inside, echoes, tmp_path):
  run = tmp_path / 'run'
  training.train(inside('masked', f'text:{echoes}', steps=1), run)
  late = ' '.join([*'ab' * 10, '[MASK]'])
  for line, message in (
    ('a b c', r"'a b c' has no \[MASK\]: write it in place of a word"),
    (f'[MASK] {late}', r'has a \[MASK\] beyond the 16 tokens of the run'),
  ):
    (tmp_path / 'lines.txt').write_text(line)
    with pytest.raises(cli.Mistake, match=message):
      predict.main(['--run', str(run), '--input', str(tmp_path / 'lines.txt')])


def test_a_line_of_more_words_than_fit(tagger, tmp_path, capsys):
  (tmp_path / 'lines.txt').write_text(' '.join(['a'] * 20) + '\n')
  capsys.readouterr()
  predict.main(['--run', str(tagger), '--input', str(tmp_path / 'lines.txt')])
  tags = lines_of(capsys)[0].split('\t')[1].split()
  assert len(tags) == 20 and tags[13:] == ['O', *['-'] * 6]


def test_a_head_of_answers_that_the_files_have_is_kept(inside, encoder, squad, tmp_path):
  trained = tmp_path / 'trained'
  shutil.copytree(encoder, trained)
  held = models.load(encoder, head='questions', num_classes=2)
  models.save_pretrained(trained, held.model, held.variables, held.config)
  settings = inside('questions', f'squad:{squad}', **{'model.source': str(trained), 'seed': 1})
  for load in (models.load, models.describe):
    pretrained, _ = training.build(settings, 2, load)
    assert pretrained.model.head == 'questions'
  pretrained, _ = training.build(settings, 2)
  stored, kept = (one.variables['params']['head']['kernel'] for one in (held, pretrained))
  np.testing.assert_array_equal(kept, stored)
  assert models.has_head(trained, 'questions') and not models.has_head(encoder, 'questions')
