"""The scores of a complete run, on its test split and on other examples."""

import json
import shutil

import numpy as np
import pytest

import jpeft
from jpeft import cli, config, evaluate, models, training
from jpeft.data.decode import decode


@pytest.fixture(scope='module')
def lora(config_file, tmp_path_factory):
  folder = tmp_path_factory.mktemp('lora') / 'run'
  training.train(config.load(f'{config_file}:lora', {'steps': '8', 'eval.every': '4'}), folder)
  return folder


def told(capsys, *words):
  """What `jpeft evaluate` prints as JSON."""
  capsys.readouterr()
  assert evaluate.main([*map(str, words), '--json']) == 0
  return json.loads(capsys.readouterr().out)


def test_scores_of_the_run_itself(lora, capsys):
  """Those of its report, to the bit; of the best theta those of its evaluation."""
  found = told(capsys, '--run', lora)
  report = json.loads((lora / 'report.json').read_text())
  assert found['values'] == report['eval']
  assert (found['split'], found['examples'], found['skipped'], found['step']) == ('test', 10, 0, 8)
  best = told(capsys, '--run', lora, '--best')
  assert best['step'] == report['best']['step']
  assert best['values'][report['best']['metric']] == report['best']['value']
  assert evaluate.main(['--run', str(lora)]) == 0
  line = capsys.readouterr().out
  assert line.startswith('test of folder:') and f'accuracy {report["eval"]["accuracy"]:.4f}' in line


def test_scores_of_other_examples(lora, images, tmp_path, capsys):
  """Of one class alone, whose number differs, as the model itself says of each image."""
  shutil.copytree(images / 'test' / 'red', tmp_path / 'other' / 'red')
  changed = [f'--config.data.name=folder:{tmp_path / "other"}', '--config.data.test', 'train+test']
  small = '--config.data.eval_batch_size=3'
  found = told(capsys, '--run', lora, *changed, small, '--out', tmp_path / 'out')
  pretrained, tuned, theta = training.reopen(lora)
  files = sorted((images / 'test' / 'red').iterdir())
  shown = training.predictions(
    training.describe(lora)[0], pretrained, tuned, theta, [{'image': decode(f, '')} for f in files]
  )
  assert found['examples'] == 5
  assert found['values']['accuracy'] == np.mean(shown.argmax(-1) == 1)
  np.testing.assert_allclose(found['values']['loss'], -np.log(shown[:, 1]).mean(), rtol=1e-5)
  assert json.loads((tmp_path / 'out' / 'scores.json').read_text()) == found | {'run': str(lora)}
  counts = json.loads((tmp_path / 'out' / 'confusion.json').read_text())
  assert counts['labels'] == ['blue', 'red'] and np.sum(counts['confusion'][1]) == 5
  assert '| red   | 5        |' in (tmp_path / 'out' / 'scores.md').read_text()
  with pytest.raises(cli.Mistake, match='is there already'):
    evaluate.main(['--run', str(lora), '--out', str(tmp_path / 'out')])


def test_several_devices_score_the_same(lora, capsys):
  cut = ('--config.mesh.data=2', '--config.mesh.model=2', '--config.mesh.backbone=sharded')
  one = told(capsys, '--run', lora)['values']
  many = told(capsys, '--run', lora, *cut, '--config.mesh.whole_below=1')['values']
  assert many.keys() == one.keys()
  for name, value in one.items():
    np.testing.assert_allclose(many[name], value, rtol=1e-5)


@pytest.mark.parametrize('on_error', ['raise', 'skip'])
def test_a_broken_example(on_error, lora, images, tmp_path, capsys):
  shutil.copytree(images, tmp_path / 'broken')
  file = tmp_path / 'broken' / 'test' / 'red' / '2.png'
  file.write_bytes(file.read_bytes()[:60])
  words = ['--run', lora, f'--config.data.name=folder:{tmp_path / "broken"}']
  if on_error == 'raise':
    with pytest.raises(cli.Mistake, match='2.png'):
      evaluate.main([*map(str, words)])
    return
  found = told(capsys, *words, '--config.data.on_error=skip')
  assert (found['examples'], found['skipped']) == (10, 1)


def test_texts_that_are_written(language, tmp_path, capsys):
  """With a metric that the run did not have."""
  settings = language(**{'method.name': 'lora', 'steps': 4, 'eval.every': 4})
  report = training.train(settings, tmp_path / 'run')
  found = told(capsys, '--run', tmp_path / 'run', '--config.eval.generate=3')
  written = found['values'].pop('exact_match'), found['values'].pop('word_error_rate')
  assert found['values'] == report['eval']
  assert written[0] in (0, 1 / 3, 2 / 3, 1) and written[1] >= 0


def test_a_run_on_a_narrow_model_is_scored_on_the_whole_one(config_file, tmp_path, capsys):
  flags = {
    'method.ratio': '0.5',
    'method.skip_first': '1',
    'method.skip_last': '0',
    'optimizer.lr': '0.1',
  }
  report = training.train(config.load(f'{config_file}:loram', flags), tmp_path / 'run')
  found = told(capsys, '--run', tmp_path / 'run')['values']
  assert found != report['eval']
  settings, _ = training.describe(tmp_path / 'run')
  pretrained, tuned, theta = training.reopen(tmp_path / 'run')
  whole = models.load(settings.model.source, num_classes=2)
  assert jpeft.count(pretrained.variables) == jpeft.count(whole.variables) > report['total']
  # The same numbers by a program of its own.
  source = jpeft.data.load(settings.data.name, 'test')
  shown = training.predictions(settings, pretrained, tuned, theta, list(source))
  labels = np.array([example['label'] for example in source])
  picked = shown[np.arange(len(labels)), labels]
  np.testing.assert_allclose(found['loss'], -np.log(picked).mean(), rtol=1e-5)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--config.optimizer.lr=1'], 'config.optimizer.lr is part of what was trained'),
    (['--config.data.tset=a'], "did you mean 'data.test'"),
    (['--config.data.test'], '--config.data.test needs a value'),
    (['--config.data.test=tset'], "did you mean 'test'"),
    (['--config.mesh.model=16'], 'needs 16 devices, there are 8; on one device give --config.mesh'),
  ],
)
def test_what_cannot_be_asked(words, message, lora):
  with pytest.raises(cli.Mistake, match=message):
    evaluate.main(['--run', str(lora), *words])


def test_labels_that_were_not_learned(lora, images, tmp_path):
  shutil.copytree(images / 'test' / 'red', tmp_path / 'green')
  with pytest.raises(cli.Mistake, match='has the labels green, and the run has learned blue, red'):
    evaluate.main(
      ['--run', str(lora), f'--config.data.name=folder:{tmp_path}', '--config.data.test=train']
    )


def test_what_a_task_trains_and_does_not_keep(config_file, tmp_path):
  flags = {'task': 'mae', 'steps': '2', 'pretraining.width': '32', 'pretraining.depth': '1'}
  training.train(config.load(f'{config_file}:lora', flags), tmp_path / 'run')
  with pytest.raises(cli.Mistake, match="which config.task='mae' itself adds"):
    evaluate.main(['--run', str(tmp_path / 'run')])
