"""Whole runs of numbers and of sets of classes: what they learn, predict and leave."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jpeft import cli, config, merge, models, plan, predict, tasks, training
from jpeft.data.decode import decode
from jpeft.training.metrics import read_metrics

TINY = {'steps': 60, 'eval.every': 30, 'optimizer.lr': 0.03, 'data.batch_size': 8, 'log.every': 5}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A table of 60 images: how red they are as a number near 1,000, and whether red and blue."""
  folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
  lines = ['file,amount,other,red,blue,all']
  for i in range(60):
    red, blue = rng.integers(0, 2, 2)
    amount = 1000 + 40 * red + 4 * rng.random()
    pixels = rng.integers(0, 60, (8, 8, 3), dtype=np.uint8)
    pixels[..., 0] += np.uint8(4 * (amount - 1000))
    pixels[..., 2] += np.uint8(180 * blue)
    Image.fromarray(pixels).save(folder / f'{i}.png')
    names = '|'.join(name for name, has in (('red', red), ('blue', blue)) if has)
    other = '' if i % 7 == 0 else f'{-0.01 * amount + blue:.4f}'
    lines.append(f'{i}.png,{amount:.3f},{other},{red},{blue if i % 5 else -1},{names}')
  (folder / 'table.csv').write_text('\n'.join(lines))
  return folder / 'table.csv'


@pytest.fixture
def made(backbone, pictures):
  """made(task, label, **{dotted key: value}) -> a config on the table."""

  def of(task, label, **overrides):
    values = {
      'task': task,
      'model.source': str(backbone),
      'model.dropout': 0.0,
      'data.name': f'csv:{pictures}?image=file&label={label}',
      'method.name': 'full',
      **TINY,
      **overrides,
    }
    return config.complete(config.nest(values))

  return of


def lines_of(capsys):
  return capsys.readouterr().out.strip().splitlines()


def test_the_same_command_on_other_labels_is_another_run(made, pictures, tmp_path):
  table = shutil.copytree(pictures.parent, tmp_path / 'pictures') / pictures.name
  name = f'csv:{table}?image=file&label=amount'
  whole = made('regression', 'amount', **{'data.name': name, 'steps': 2, 'eval.every': 2})
  training.train(whole, tmp_path / 'run')
  (tmp_path / 'run/report.json').unlink()
  table.write_text(table.read_text().replace('.png,1', '.png,2'))
  with pytest.raises(cli.Mistake, match='was begun with other labels to train on'):
    training.train(whole, tmp_path / 'run')


def test_numbers_are_learned_and_predicted_in_their_units(made, pictures, tmp_path, capsys):
  whole = made('regression', 'amount')
  told = training.train(whole, tmp_path / 'run')
  assert told['eval']['r2'] > 0.8 and told['eval']['rmse'] < 10
  assert told['best']['metric'] == 'mse'
  rows = [row for row in read_metrics(tmp_path / 'run/metrics.jsonl') if row['split'] == 'train']
  assert all('accuracy' not in row for row in rows) and rows[-1]['loss'] < rows[0]['loss']
  report = (tmp_path / 'run/report.md').read_text()
  assert '| rmse |' in report and f'{told["eval"]["rmse"]:.4g}' in report
  info = json.loads((tmp_path / 'run/run.json').read_text())
  assert info['labels'] == ['amount'] and 1000 < info['facts']['mean'][0] < 1044
  assert training.train(whole, tmp_path / 'run') == told

  # The test split by `jpeft predict` has the scores of the report.
  source = tasks.REGRESSION.source(whole, 'test')
  labels = [float(source[i]['label'][0]) for i in range(len(source))]
  files = [str(pictures.parent / f'{row}.png') for row in source.rows]
  assert predict.main(['--run', str(tmp_path / 'run'), '--json', '--input', *files]) == 0
  found = [json.loads(line)['values']['amount'] for line in lines_of(capsys)]
  assert np.mean(np.square(np.subtract(found, labels))) == pytest.approx(
    told['eval']['mse'], rel=1e-3
  )
  predict.main(['--run', str(tmp_path / 'run'), '--input', files[0]])
  name, value = lines_of(capsys)[0].split('\t')
  assert name == files[0] and float(value) == pytest.approx(found[0], rel=1e-5)


def test_merged_weights_give_the_units_of_the_data(made, pictures, tmp_path, capsys):
  changes = {'steps': 4, 'eval.every': 4, 'method.name': 'lora'}
  training.train(made('regression', 'amount,other', **changes), tmp_path / 'run')
  assert merge.main(['--run', str(tmp_path / 'run'), '--out', str(tmp_path / 'out')]) == 0
  assert float(capsys.readouterr().out.split(' are ')[1].split()[0]) < 1e-2
  plain = models.load(tmp_path / 'out')
  assert plain.config['problem_type'] == 'regression'
  assert plain.config['id2label'] == {'0': 'amount', '1': 'other'}
  file = str(pictures.parent / '3.png')
  predict.main(['--run', str(tmp_path / 'run'), '--json', '--input', file])
  told = json.loads(capsys.readouterr().out)['values']
  pretrained, _, _ = training.reopen(tmp_path / 'run')
  transform = tasks.modality_of(pretrained).transform(
    made('regression', 'amount'), pretrained, False
  )
  x = transform({'image': decode(Path(file), file)}, None)['image'][None]
  found = plain.model.apply(plain.variables, x)[0]
  np.testing.assert_allclose(found, list(told.values()), rtol=1e-5)


def test_several_numbers_some_of_which_are_missing(made, tmp_path):
  told = training.train(made('regression', 'amount,other', **{'loss.name': 'huber'}), tmp_path)
  assert told['eval']['r2'] > 0.5
  each = json.loads((tmp_path / 'labels.json').read_text())['labels']
  assert np.mean([each[name]['r2'] for name in ('amount', 'other')]) == told['eval']['r2']
  assert '| amount | ' in (tmp_path / 'report.md').read_text()
  assert json.loads((tmp_path / 'run.json').read_text())['labels'] == ['amount', 'other']


def test_labels_that_are_not_standardised(made, tmp_path):
  changes = {'loss.standardize': False, 'steps': 2, 'eval.every': 2}
  told = training.train(made('regression', 'amount', **changes), tmp_path)
  assert told['eval']['loss'] == pytest.approx(told['eval']['mse'], rel=1e-5)
  assert json.loads((tmp_path / 'run.json').read_text())['facts'] == {}


@pytest.mark.parametrize(
  'label',
  ['red,blue', 'all&labels_by=|'],
)
def test_sets_are_learned_and_predicted(made, pictures, tmp_path, capsys, label):
  changes = {'loss.class_weights': 'balanced', 'loss.focal': 1.0}
  told = training.train(made('multilabel', label, **changes), tmp_path / 'run')
  assert told['eval']['mean_average_precision'] > 0.9 and told['eval']['micro_f1'] > 0.8
  assert told['best']['metric'] == 'mean_average_precision'
  info = json.loads((tmp_path / 'run/run.json').read_text())
  assert sorted(info['labels']) == ['blue', 'red'] and len(info['facts']['class_weights']) == 2
  rows = [row for row in read_metrics(tmp_path / 'run/metrics.jsonl') if row['split'] == 'train']
  assert rows[-1]['accuracy'] > 0.8

  files = [str(pictures.parent / f'{i}.png') for i in range(20)]
  predict.main(['--run', str(tmp_path / 'run'), '--json', '--input', *files])
  found = [json.loads(line) for line in lines_of(capsys)]
  sets = [set(line.split(',')[-1].split('|')) - {''} for line in pictures.read_text().splitlines()]
  assert (
    np.mean([set(row['labels']) == has for row, has in zip(found, sets[1:21], strict=True)]) > 0.6
  )
  for row in found:
    assert set(row['labels']) == {n for n, p in row['probabilities'].items() if p >= 0.5}
  predict.main(['--run', str(tmp_path / 'run'), '--input', *files])
  assert len(lines_of(capsys)) == 20


def test_texts_too(decoder, tmp_path):
  file = tmp_path / 'a.jsonl'
  letters = 'abcdefghij'
  rows = [
    {'text': f'{x} {y}', 'label': sorted({x, y} & set('abc'))} for x in letters for y in letters
  ]
  file.write_text('\n'.join(map(json.dumps, rows)))
  values = {
    'task': 'multilabel',
    'model.source': str(decoder),
    'data.name': f'jsonl:{file}',
    'data.max_length': 4,
    'method.name': 'lora',
    **TINY,
    'steps': 30,
  }
  told = training.train(config.complete(config.nest(values)), tmp_path / 'run')
  rows = read_metrics(tmp_path / 'run/metrics.jsonl')
  assert 'mean_average_precision' in told['eval']
  assert told['eval']['loss'] < next(row['loss'] for row in rows if row['split'] == 'train')


@pytest.mark.parametrize(
  ('task', 'label'), [('regression', 'amount,other'), ('multilabel', 'red,blue')]
)
def test_micro_batches_give_the_mean_of_the_batch(made, tmp_path, task, label):
  theta = []
  for parts in (1, 4):
    changes = {'optimizer.accumulate': parts, 'steps': 3, 'optimizer.name': 'sgd', 'eval.every': 3}
    training.train(made(task, label, **changes), tmp_path / str(parts))
    theta.append(training.reopen(tmp_path / str(parts))[2])
  for a, b in zip(*map(jax.tree.leaves, theta), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_cached_features_change_nothing(made, tmp_path):
  scores = []
  for cached in (False, True):
    changes = {'method.name': 'linear', 'data.cache_features': cached, 'steps': 6, 'eval.every': 6}
    told = training.train(made('regression', 'amount,other', **changes), tmp_path / str(cached))
    scores.append(told['eval'])
  assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_weights_move_what_is_learned(made, tmp_path):
  said = {}
  for heavy in ('0', '1'):
    changes = {'loss.class_weights': ((heavy, 30.0),), 'steps': 5, 'eval.every': 5}
    training.train(made('classification', 'red', **changes), tmp_path / heavy)
    kept = json.loads((tmp_path / heavy / 'confusion.json').read_text())
    said[heavy] = np.array(kept['confusion']).sum(0)
  assert said['0'][0] > said['1'][0]


@pytest.mark.parametrize(('task', 'label'), [('regression', 'amount'), ('multilabel', 'red,blue')])
def test_two_devices_give_what_one_gives(made, tmp_path, task, label):
  scores = []
  for devices in (1, 2):
    changes = {'mesh.data': devices, 'steps': 4, 'eval.every': 4}
    told = training.train(made(task, label, **changes), tmp_path / str(devices))
    scores.append(told['eval'])
  assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_evaluations_do_not_depend_on_their_batches(made, tmp_path):
  scores = []
  for size in (3, 16):
    changes = {'data.eval_batch_size': size, 'steps': 2, 'eval.every': 2}
    scores.append(
      training.train(made('regression', 'amount', **changes), tmp_path / str(size))['eval']
    )
  assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize(('task', 'outputs'), [('regression', 1), ('multilabel', 10)])
def test_a_plan_needs_no_data(made, backbone, task, outputs, tmp_path, capsys):
  file = tmp_path / 'c.py'
  file.write_text(
    'def get_config():\n'
    f'  return {{"task": {task!r}, "model": {{"source": {str(backbone)!r}}}, "steps": 1,\n'
    '          "data": {"name": "csv:nowhere.csv", "batch_size": 4},\n'
    '          "method": {"name": "linear"}}\n'
  )
  assert plan.main([f'--config={file}', '--target=cpu', '--json']) == 0
  (row,) = json.loads(capsys.readouterr().out)
  assert row['trainable'] == 17 * outputs and row['fits'] is not False


def test_a_run_of_other_labels_is_told(made, tmp_path):
  with pytest.raises(
    cli.Mistake, match=r"line 2 of .*table.csv has '0.png' as its 'file'; it must"
  ):
    training.train(made('regression', 'file'), tmp_path / 'a')
  with pytest.raises(cli.Mistake, match='config.model.num_classes is 3, but csv:.* has 1 labels'):
    training.train(made('regression', 'amount', **{'model.num_classes': 3}), tmp_path / 'b')
