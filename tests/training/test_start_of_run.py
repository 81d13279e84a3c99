"""Runs that start from the theta of another run."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft import cli, training
from jpeft.training import start as start_lib
from tests.training import killing

STILL = {
  'steps': 1,
  'optimizer.name': 'sgd',
  'optimizer.lr': 1e-30,  # moves no float32
  'schedule.name': 'constant',
}
METHOD = {'method.rank': 2}


@pytest.fixture(scope='module')
def finished(config_file, tmp_path_factory):
  """A complete run of LoRA and the head, of two classes."""
  from jpeft import config

  folder = tmp_path_factory.mktemp('finished') / 'run'
  training.train(config.load(f'{config_file}:lora', {'method.rank': '2'}), folder)
  return folder


@pytest.fixture(scope='module')
def three(images, tmp_path_factory):
  """A data set of three classes."""
  root = tmp_path_factory.mktemp('three')
  shutil.copytree(images, root / 'images')
  for split in ('train', 'test'):
    shutil.copytree(root / 'images' / split / 'red', root / 'images' / split / 'purple')
  return f'folder:{root / "images"}'


def told_by(folder):
  return json.loads((folder / 'report.json').read_text())


@pytest.mark.parametrize('kind', ('folder', 'file'))
def test_a_run_starts_where_another_one_ended(load, finished, tmp_path, capsys, kind):
  place = {'folder': finished, 'file': finished / 'theta.safetensors'}[kind]
  told = training.train(load('lora', **METHOD, **STILL, **{'method.start': place}), tmp_path)
  ended = told_by(finished)
  assert told['eval'] == ended['eval'] and told['theta_sha256'] == ended['theta_sha256']
  lines = capsys.readouterr().err
  assert f'theta starts as {finished}/theta.safetensors: 10 of 10 arrays\n' in lines
  fresh = training.train(load('lora', **METHOD, **STILL), tmp_path / 'fresh')
  assert fresh['theta_sha256'] != ended['theta_sha256']
  assert json.loads((tmp_path / 'fresh/run.json').read_text())['start_sha256'] is None


def test_the_head_of_other_labels_is_fresh_and_told(load, finished, three, tmp_path, capsys):
  settings = {**METHOD, **STILL, 'data.name': three, 'method.start': finished}
  training.train(load('lora', **settings), tmp_path)
  lines = capsys.readouterr().err
  assert (
    '8 of 10 arrays; fresh: head/head/bias, head/head/kernel; left out, another head: '
    'head/head/bias, head/head/kernel\n'
  ) in lines
  ended = load_file(finished / 'theta.safetensors')
  theta = load_file(tmp_path / 'theta.safetensors')
  assert theta['head/head/kernel'].shape == (16, 3)
  for path, x in ended.items():
    if not path.startswith('head/'):
      np.testing.assert_array_equal(theta[path], x)
  # What was trained is opened without the run that it started from.
  assert training.reopen(tmp_path)[2]['head']['head']['kernel'].shape == (16, 3)


def test_full_tuning_takes_its_head_as_a_head(load, three, tmp_path):
  _, two = training.build(load('full'), 2)
  shapes = training.build(load('full'), 3)[1].shapes
  file = tmp_path / 'theta.safetensors'
  theta = {
    'full': {
      p: {n: np.ones(x.shape, x.dtype) for n, x in t.items()} for p, t in shapes['full'].items()
    }
  }
  training.save_theta(file, theta)
  found = start_lib.start_of(load('full', **{'method.start': file}), two, tmp_path / 'none')
  assert 'full/head/kernel' not in found.arrays and 'full/embed/kernel' not in found.told
  assert 'fresh: full/head/bias, full/head/kernel' in found.told


def changed(finished, tmp_path, **arrays):
  """A theta file with some arrays replaced, left out (None) or added."""
  file = tmp_path / 'changed.safetensors'
  found = load_file(finished / 'theta.safetensors')
  for path, x in arrays.items():
    if x is None:
      del found[path]
    else:
      found[path] = x
  save_file(found, file)
  return file


A = 'lora/encoder/block_0/attention/query/kernel/a'


@pytest.mark.parametrize(
  ('arrays', 'message'),
  (
    (
      {'pfeiffer/encoder/block_0/mlp/down': np.ones(3)},
      "has 'pfeiffer/.*', which the method has not",
    ),
    (
      {A: np.ones((16, 4), 'float32')},
      rf"has '{A}', float32 \[16, 4\], where .* float32 \[16, 2\]",
    ),
    ({A: np.ones((16, 2), 'float64')}, rf"has '{A}', float64 \[16, 2\], where .* float32"),
  ),
)
def test_what_the_method_has_not_is_an_error(load, finished, tmp_path, arrays, message):
  file = changed(finished, tmp_path, **arrays)
  config = load('lora', **METHOD, **{'method.start': file})
  with pytest.raises(cli.Mistake, match=message):
    training.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'config.json').exists()  # a corrected command may use it


def test_what_the_file_lacks_starts_fresh(load, finished, tmp_path, capsys):
  file = changed(finished, tmp_path, **{A: None})
  training.train(load('lora', **METHOD, **STILL, **{'method.start': file}), tmp_path / 'run')
  assert f'9 of 10 arrays; fresh: {A}\n' in capsys.readouterr().err


def test_a_file_with_nothing_of_the_method_is_an_error(load, finished, three, tmp_path):
  training.train(load('linear', **{'steps': 1}), tmp_path / 'linear')
  settings = {**METHOD, 'data.name': three, 'method.start': tmp_path / 'linear'}
  with pytest.raises(cli.Mistake, match='nothing that the method could start from: .* head/head'):
    training.train(load('lora', **settings), tmp_path / 'run')


@pytest.mark.parametrize(
  ('place', 'message'),
  (
    ('nowhere', 'there is no such file or run folder'),
    ('empty', 'has no theta.safetensors: is it the folder of a run, and complete'),
    ('text', 'is not a readable safetensors file'),
  ),
)
def test_places_that_are_no_start(load, tmp_path, place, message):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'text').write_text('theta')
  with pytest.raises(cli.Mistake, match=message):
    training.train(load('lora', **{'method.start': tmp_path / place}), tmp_path / 'run')


def test_a_run_that_was_stopped_does_not_read_its_start_again(
  load, finished, tmp_path, monkeypatch, capsys
):
  start = shutil.copytree(finished, tmp_path / 'start')
  config = load('lora', **METHOD, **{'method.start': start})
  whole = training.train(config, tmp_path / 'whole')
  killing.interrupt(monkeypatch, 5)
  with pytest.raises(cli.Stopped):
    training.train(config, tmp_path / 'cut')
  shutil.copytree(tmp_path / 'cut', tmp_path / 'again')
  shutil.copytree(tmp_path / 'cut', tmp_path / 'early')
  shutil.rmtree(tmp_path / 'early' / 'checkpoints')

  file = start / 'theta.safetensors'
  theta = load_file(file)
  save_file({path: x + 1 for path, x in theta.items()}, file)
  # Killed before its first checkpoint, it would begin from another theta; later it is told as well.
  for name in ('early', 'again'):
    with pytest.raises(cli.Mistake, match=f'{name} was begun with another .*theta.safetensors'):
      training.train(config, tmp_path / name)

  shutil.rmtree(start)
  with pytest.raises(cli.Mistake, match='there is no such file or run folder'):
    training.train(config, tmp_path / 'early')
  capsys.readouterr()
  assert training.train(config, tmp_path / 'cut')['theta_sha256'] == whole['theta_sha256']
  lines = capsys.readouterr().err
  assert 'going on after' in lines and 'theta starts as' not in lines
