"""The model of a run, from its folder alone."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from jpeft import adapter, attach, cli, config, merge, models, predict, tasks, training
from jpeft.data.decode import decode
from jpeft.export import peft_adapter
from tests.runs import LLAMA


@pytest.fixture(scope='module')
def lora(config_file, tmp_path_factory):
  folder = tmp_path_factory.mktemp('lora') / 'run'
  training.train(config.load(f'{config_file}:lora', {'steps': '20', 'eval.every': '20'}), folder)
  return folder


def test_predict_names_labels_and_probabilities(lora, images, capsys):
  files = sorted((images / 'test').rglob('*.png'))
  assert predict.main(['--run', str(lora), '--input', *map(str, files), '--json']) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row['input'] for row in rows] == [str(f) for f in files]
  for row in rows:
    assert set(row['probabilities']) == {'blue', 'red'} and sum(
      row['probabilities'].values()
    ) == pytest.approx(1)
    assert (
      row['probability'] == row['probabilities'][row['label']] == max(row['probabilities'].values())
    )
  hits = np.mean([f.parent.name == row['label'] for f, row in zip(files, rows, strict=True)])
  assert hits == json.loads((lora / 'report.json').read_text())['eval']['accuracy']
  predict.main(['--run', str(lora), '--input', str(files[0]), '--best'])
  name, label, share = capsys.readouterr().out.strip().split('\t')
  assert name == str(files[0]) and label in ('blue', 'red') and 0.5 <= float(share) <= 1


def test_merge_writes_weights_that_the_plain_model_reads(lora, images, tmp_path, capsys):
  assert merge.main(['--run', str(lora), '--out', str(tmp_path / 'out')]) == 0
  apart = float(capsys.readouterr().out.split(' are ')[1].split()[0])
  assert apart < 1e-5
  plain = models.load(tmp_path / 'out')
  pretrained, tuned, theta = training.reopen(lora)
  image = next((images / 'test/red').iterdir())
  transform = tasks.modality_of(pretrained).transform(training.describe(lora)[0], pretrained, False)
  x = transform({'image': decode(image, '')}, None)['image'][None]
  expected = tuned.apply(theta, pretrained.variables, x, deterministic=True)
  np.testing.assert_allclose(plain.model.apply(plain.variables, x), expected, atol=1e-5)
  assert plain.preprocess == pretrained.preprocess
  assert plain.config['id2label'] == {'0': 'blue', '1': 'red'}
  merged, before = (jax.tree.leaves(v) for v in (plain.variables, pretrained.variables))
  assert (
    sum(not np.array_equal(a, b) for a, b in zip(merged, before, strict=True)) >= 6
  )  # q, v of two blocks, head
  with pytest.raises(cli.Mistake, match='is there already'):
    merge.main(['--run', str(lora), '--out', str(tmp_path / 'out')])


def test_an_adapter_of_a_run_goes_on_the_base_model(lora, config_file, tmp_path, capsys):
  assert adapter.main(['--run', str(lora), '--out', str(tmp_path / 'out')]) == 0
  assert str(tmp_path / 'out') in capsys.readouterr().out
  pretrained, tuned, theta = training.reopen(lora)
  method, kept = peft_adapter.load_adapter(tmp_path / 'out', pretrained)
  assert method.names == ('lora', 'modules')
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype('float32')
  again = attach(pretrained.model, method, pretrained.variables, x)
  np.testing.assert_allclose(
    again.apply(kept, pretrained.variables, x),
    tuned.apply(theta, pretrained.variables, x),
    atol=1e-6,
  )
  with pytest.raises(cli.Mistake, match='is there already'):
    adapter.main(['--run', str(lora), '--out', str(tmp_path / 'out')])
  training.train(
    config.load(f'{config_file}:ia3', {'steps': '2', 'eval.every': '2'}), tmp_path / 'scales'
  )
  assert adapter.main(['--run', str(tmp_path / 'scales'), '--out', str(tmp_path / 'ia3')]) == 0
  method, _ = peft_adapter.load_adapter(tmp_path / 'ia3', pretrained)
  assert method.names == ('ia3', 'modules')
  training.train(
    config.load(f'{config_file}:linear', {'steps': '2', 'eval.every': '2'}), tmp_path / 'probe'
  )
  with pytest.raises(cli.Mistake, match='linear is neither LoRA nor DoRA'):
    adapter.main(['--run', str(tmp_path / 'probe'), '--out', str(tmp_path / 'other')])


BERT = {
  'model_type': 'bert',
  'vocab_size': 12,
  'hidden_size': 16,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'intermediate_size': 32,
  'max_position_embeddings': 16,
  'type_vocab_size': 2,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-12,
  'hidden_dropout_prob': 0.0,
  'attention_probs_dropout_prob': 0.0,
  'pad_token_id': 0,
}


@pytest.fixture(scope='module')
def reviews(tmp_path_factory):
  """(a BERT's folder with its tokenizer, a CSV file of texts with labels)."""
  from tokenizers import models as parts
  from tokenizers import pre_tokenizers

  folder = tmp_path_factory.mktemp('bert')
  model = models.from_config(BERT)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  models.save_pretrained(folder, model, variables, BERT)
  words = [
    '[PAD]',
    '[UNK]',
    'good',
    'bad',
    'fine',
    'poor',
    'a',
    'film',
    'plot',
    'very',
    'great',
    'awful',
  ]
  tokenizer = Tokenizer(parts.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  texts = [
    (f'{a} {b} {c}', label)
    for a in ('a', 'very')
    for c in ('film', 'plot', 'a film', 'a plot')
    for b, label in (
      ('good', 'pos'),
      ('great', 'pos'),
      ('fine', 'pos'),
      ('bad', 'neg'),
      ('poor', 'neg'),
      ('awful', 'neg'),
    )
  ]
  table = folder / 'reviews.csv'
  table.write_text('text,label\n' + ''.join(f'{text},{label}\n' for text, label in texts))
  return folder, table


def learn(config_file, backbone, table, run, **more):
  """Trains a backbone whole on the labels of a table of texts, until it knows them."""
  chosen = {
    'model.source': backbone,
    'data.name': f'csv:{table}',
    'data.max_length': 6,
    'data.batch_size': 8,
    'steps': 80,
    'eval.every': 80,
    'optimizer.lr': 1e-2,
    **more,
  }
  settings = config.load(f'{config_file}:full', {k: str(v) for k, v in chosen.items()})
  told = training.train(settings, run)
  assert told['eval']['accuracy'] > 0.9


def test_texts_from_training_to_merged_weights(reviews, config_file, tmp_path, capsys, monkeypatch):
  folder, table = reviews
  learn(config_file, folder, table, tmp_path / 'run', **{'model.pool': 'mean'})
  (tmp_path / 'lines.txt').write_text('a great plot\n\nvery poor film\n')
  capsys.readouterr()
  predict.main(['--run', str(tmp_path / 'run'), '--input', str(tmp_path / 'lines.txt')])
  assert [line.split('\t')[:2] for line in capsys.readouterr().out.splitlines()] == [
    ['a great plot', 'pos'],
    ['very poor film', 'neg'],
  ]
  monkeypatch.setattr(sys, 'stdin', ['awful\n'])
  predict.main(['--run', str(tmp_path / 'run'), '--input', '-'])
  assert capsys.readouterr().out.startswith('awful\tneg')
  merge.main(['--run', str(tmp_path / 'run'), '--out', str(tmp_path / 'out')])
  assert (tmp_path / 'out/tokenizer.json').exists()
  assert models.load(tmp_path / 'out').config['label2id'] == {'neg': 0, 'pos': 1}


def test_texts_with_tokens_beyond_the_table(reviews, config_file, tmp_path, monkeypatch):
  folder = shutil.copytree(reviews[0], tmp_path / 'larger')
  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.add_tokens(['new'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  table = tmp_path / 'own.csv'
  chosen = {
    'model.source': folder,
    'data.name': f'csv:{table}',
    'data.test': 'train',
    'data.max_length': 6,
    'model.pool': 'mean',
    'steps': 1,
  }
  settings = config.load(f'{config_file}:linear', {k: str(v) for k, v in chosen.items()})
  texts = [f'a film {word}' for word in 'abcdefghijklmno']
  table.write_text('text,label\n' + ''.join(f'{text},{i % 2}\n' for i, text in enumerate(texts)))
  training.train(settings, tmp_path / 'run')
  monkeypatch.setattr(sys, 'stdin', ['a film\n', 'a new film\n'])
  told = "'a new film' has the token 'new' with the number 12, and the model has rows for 12"
  with pytest.raises(cli.Mistake, match=told):
    predict.main(['--run', str(tmp_path / 'run'), '--input', '-'])
  table.write_text(table.read_text() + ''.join(f'a new film,{i % 2}\n' for i in range(9)))
  with pytest.raises(cli.Mistake, match=f'example [0-9]+: {told}'):
    training.train(settings, tmp_path / 'other')


def test_a_decoder_learns_labels(reviews, config_file, tmp_path):
  folder, table = reviews
  llama = {**LLAMA, 'vocab_size': 12}
  model = models.from_config(llama)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  models.save_pretrained(tmp_path / 'llama', model, variables, llama)
  shutil.copy(folder / 'tokenizer.json', tmp_path / 'llama')
  learn(config_file, tmp_path / 'llama', table, tmp_path / 'run')
  merge.main(['--run', str(tmp_path / 'run'), '--out', str(tmp_path / 'out')])
  assert models.load(tmp_path / 'out').config['architectures'] == ['LlamaForSequenceClassification']
