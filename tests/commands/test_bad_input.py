"""Whatever is wrong with a command is told in one sentence, exit code 2, before long work
begins.
"""

import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft import cli, merge, predict, train, training

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def told(monkeypatch, capsys):
  """told(main, *argv) -> what a failing command says on stderr; checks that it is one sentence."""

  def command(main, *argv, before=0):
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', ['jpeft', *map(str, argv)])
    start = time.process_time()  # of this process alone: other tests may run beside it
    code = cli.command('jpeft', main)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert time.process_time() - start < 10
    assert len(lines) == 1 + before and lines[-1].startswith('jpeft: error: '), lines
    return lines[-1]

  return command


@pytest.fixture
def bad(told, config_file, tmp_path):
  """bad(*overrides, method=...) -> what training says."""

  def command(*overrides, method='linear', config=None, before=0):
    return told(
      train.main,
      f'--config={config or config_file}:{method}',
      *overrides,
      f'--workdir={tmp_path / "run"}',
      before=before,
    )

  return command


@pytest.fixture
def copy(backbone, tmp_path):
  """A copy of the backbone's folder, to be damaged."""
  return shutil.copytree(backbone, tmp_path / 'copy')


@pytest.fixture(scope='module')
def finished(config_file, tmp_path_factory):
  """A complete run of a method that cannot be merged."""
  from jpeft import config

  folder = tmp_path_factory.mktemp('finished') / 'run'
  training.train(config.load(f'{config_file}:lst', {'steps': '1'}), folder)
  return folder


# ---- The command line and the config.


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (
      ['--config.optimizer.lrr=1'],
      "unknown config key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
    ),
    (['--config.steps=many'], "config.steps must be of type int or None, not str 'many'"),
    (['--config.model.scan=1'], 'config.model.scan must be of type bool, not int 1'),
    (
      ['--config.model.remat=all'],
      "config.model.remat must be true, false, 'dots', 'packed' or 'packed4', not 'all'",
    ),
    (['--config.optimizer.lr=-0.1'], 'config.optimizer.lr must be above 0, not -0.1'),
    (['--config.optimizer.lr=inf'], "not str 'inf'"),
    (['--config.optimizer.name=adamm'], 'config.optimizer.name must be one of adamw, adam'),
    (['--config.epochs=3'], 'either steps or epochs, not both'),
    (
      ['--config.optimizer.accumulate=3'],
      'batch_size=4 is not divisible by config.optimizer.accumulate=3',
    ),
    (['--config.schedule.warmup_steps=20'], 'a warm-up of 20 updates is longer than the run of 12'),
    (['--config.model=x'], "unknown config key 'model'"),
    (['--confg=x'], "unknown argument '--confg'; did you mean '--config'?"),
    (['--config.seed'], '--config.seed needs a value'),
  ],
)
def test_flags(bad, flags, said):
  assert said in bad(*flags)


def test_no_config_file(told, config_file):
  assert 'did you mean' in told(train.main, f'--config={config_file.parent}/tinny.py')
  assert '--config=FILE.py is missing' in told(train.main, '--workdir=x')
  assert 'is not a python file' in told(train.main, '--config=runs/a')


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('def get_config(:', 'cannot be read as python: SyntaxError'),
    ('x = 1', 'has no function get_config'),
    ('def get_config(a): return {}["x"]', "raised KeyError: 'x'"),
    ('def get_config(a): return {"steps": 1}', "does not set 'model.source'"),
    ('def get_config(a): return 3', 'a config is a dict, not int'),
  ],
)
def test_broken_config_files(bad, tmp_path, text, said):
  (tmp_path / 'own.py').write_text(text + '\n')
  assert said in bad(config=tmp_path / 'own.py')


# ---- Method, model, data.


def test_unknown_method(bad):
  assert "no method is called 'linaer'; did you mean 'linear'?" in bad(method='linaer')


def test_method_arguments(bad):
  said = bad('--config.method.target=x', method='bitfit')
  assert "has no hyperparameter 'target'; did you mean 'targets'?" in said
  assert 'reduction' in bad('--config.method.reduction=none', method='lst')


def test_pattern_that_matches_nothing(bad):
  assert 'no site matches' in bad('--config.method.targets=encoder/blok_.*', method='bitfit')
  assert 'matches no leaf of theta; near it are' in bad(
    "--config.optimizer.groups=[('lora/.*', 2.0)]"
  )
  assert 'has no role {quary}' in bad('--config.method.targets={quary}', method='bitfit')


def test_unknown_model(bad):
  assert 'the nearest names: dinov2-s14' in bad('--config.model.source=dinov2')
  assert 'is neither a folder' in bad('--config.model.source=/no/such/folder')


def test_unknown_data(bad, images):
  assert "unknown data set 'mnist'; did you mean 'mnist5k'?" in bad('--config.data.name=mnist')
  assert 'there is no folder /no/such/images' in bad('--config.data.name=folder:/no/such/images')
  assert 'valid' in bad('--config.data.test=valid')
  assert 'no examples' in bad('--config.data.test=test[:0]')


def test_labels_and_sizes(bad):
  assert 'config.model.num_classes is 3, but' in bad('--config.model.num_classes=3')
  assert 'batch_size=64 is more than the 24 examples' in bad('--config.data.batch_size=64')
  assert 'no multiple of the patch size 4' in bad('--config.model.image_size=10')
  assert 'mesh.data=2 x mesh.model=9 needs 18 devices, there are 8' in bad(
    '--config.mesh.data=2', '--config.mesh.model=9'
  )
  assert 'mesh.data=1 x mesh.model=2 x mesh.sequence=5 needs 10 devices, there are 8' in bad(
    '--config.mesh.model=2', '--config.mesh.sequence=5'
  )
  assert 'mesh.sequence=2 cuts rows of tokens, and this model reads no such rows' in bad(
    '--config.mesh.sequence=2'
  )


def test_f1_is_of_two_classes(bad, images, tmp_path):
  own = shutil.copytree(images, tmp_path / 'images')
  shutil.copytree(own / 'train/red', own / 'train/green')
  said = bad(f'--config.data.name=folder:{own}', "--config.eval.also=('f1',)")
  assert "the metric 'f1' is that of two classes, and" in said and "has 3: take 'macro_f1'" in said


def test_truncated_weights(bad, copy):
  file = copy / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])
  assert f'{file} is no readable safetensors file' in bad(f'--config.model.source={copy}')


def test_lying_header(bad, copy):
  file = copy / 'model.safetensors'
  whole = file.read_bytes()
  file.write_bytes(struct.pack('<Q', 2**40) + whole[8:])
  assert 'is no readable safetensors file' in bad(f'--config.model.source={copy}')


def test_mismatched_shapes(bad, copy):
  tensors = load_file(copy / 'model.safetensors')
  name = next(k for k in tensors if k.endswith('query.weight'))
  save_file(tensors | {name: np.zeros((16, 17), np.float32)}, copy / 'model.safetensors')
  error = bad(f'--config.model.source={copy}')
  assert name in error and '17' in error


def test_weights_that_are_missing_or_pickled(bad, copy):
  (copy / 'model.safetensors').unlink()
  assert 'holds neither model.safetensors' in bad(f'--config.model.source={copy}')
  (copy / 'pytorch_model.bin').write_bytes(pickle.dumps({}))
  assert 'only safetensors is read, since unpickling can run code' in bad(
    f'--config.model.source={copy}'
  )
  (copy / 'config.json').unlink()
  assert 'holds no config.json' in bad(f'--config.model.source={copy}')


def test_data_that_is_no_image(bad, images, tmp_path):
  own = shutil.copytree(images, tmp_path / 'images')
  for file in (own / 'train/red').iterdir():
    file.write_text('no image')
  assert 'is no readable image' in bad(f'--config.data.name=folder:{own}')


@pytest.mark.parametrize('split', ['train', 'test'])
def test_images_that_are_cut_off(bad, images, tmp_path, split):
  own = shutil.copytree(images, tmp_path / 'images')
  for file in (own / split / 'red').iterdir():
    file.write_bytes(file.read_bytes()[:60])  # the header is whole
  name = f'--config.data.name=folder:{own}'
  assert 'is no readable image' in bad(name, '--config.data.in_memory=true')
  # Not read ahead, one is met in the middle of training or of an evaluation, after the lines that
  # tell what is trained.
  assert 'is no readable image' in bad(name, before=2)


# ---- Run folders.


def test_workdir_of_another_config(bad, finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'run').rglob('*') if p.name != '.lock'}
  error = bad('--config.seed=5')
  assert 'holds a run with another config' in error and 'seed (5 here, 0 there)' in error
  assert 'method.name' in error and 'steps' in error
  after = {p: p.stat().st_mtime_ns for p in before}
  assert after == before


def test_workdir_that_holds_something_else(bad, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/thesis.tex').write_text('x')
  assert 'holds files but no config.json' in bad()
  shutil.rmtree(tmp_path / 'run')
  (tmp_path / 'run').write_text('x')
  assert 'is a file, not a folder' in bad()


def test_two_trainers_in_one_folder(bad, load, tmp_path):
  with training.claimed(tmp_path / 'run', load('linear')):
    assert 'another process is training in' in bad()


@pytest.fixture
def half(load, tmp_path):
  """A run folder as a kill leaves it: checkpoints of 9 and 12 updates, no report."""
  training.train(load('linear'), tmp_path / 'run')
  for name in ('report.json', 'theta.safetensors'):
    (tmp_path / 'run' / name).unlink()
  return tmp_path / 'run'


def test_backbone_changed_under_a_run(bad, half, copy):
  kept = json.loads((half / 'config.json').read_text())
  kept['model']['source'] = str(copy)
  (half / 'config.json').write_text(json.dumps(kept))
  tensors = load_file(copy / 'model.safetensors')
  save_file({k: v + 1 for k, v in tensors.items()}, copy / 'model.safetensors')
  assert 'was begun with other backbone_sha256' in bad(f'--config.model.source={copy}')


# ---- predict and merge.


def test_predict(told, finished, images, tmp_path):
  image = next((images / 'test/red').iterdir())
  (tmp_path / 'note.png').write_text('no image')
  assert 'there is no run folder' in told(
    predict.main, '--run', tmp_path / 'none', '--input', image
  )
  assert 'is not the folder of a run: it has no config.json' in told(
    predict.main, '--run', tmp_path, '--input', image
  )
  assert 'there is no file' in told(
    predict.main, '--run', finished, '--input', tmp_path / 'none.png'
  )
  assert 'is no readable image' in told(
    predict.main, '--run', finished, '--input', tmp_path / 'note.png'
  )


def test_predict_before_the_end(told, half, images):
  image = next((images / 'test/red').iterdir())
  assert 'the run is not complete' in told(predict.main, '--run', half, '--input', image)


def test_merge_of_an_unmergeable_method(told, finished, tmp_path):
  error = told(merge.main, '--run', finished, '--out', tmp_path / 'out')
  assert 'lst cannot be merged' in error and not (tmp_path / 'out').exists()


def test_theta_that_was_damaged(told, finished, images, tmp_path):
  folder = shutil.copytree(finished, tmp_path / 'run')
  file = folder / 'theta.safetensors'
  file.write_bytes(file.read_bytes()[:-8])
  image = next((images / 'test/red').iterdir())
  assert 'is not a readable safetensors file' in told(
    predict.main, '--run', folder, '--input', image
  )


# ---- As a user starts it.


@pytest.mark.parametrize(
  ('module', 'flags', 'said'),
  [
    ('train', ['--config={config}', '--config.optimizer.lerning_rate=1'], 'unknown config key'),
    ('train', ['--config={config}:loraa', '--workdir={tmp}/run'], "no method is called 'loraa'"),
    ('predict', ['--run', '{tmp}', '--input', 'x.png'], 'is not the folder of a run'),
  ],
)
def test_as_a_process(config_file, tmp_path, module, flags, said):
  flags = [flag.format(config=config_file, tmp=tmp_path) for flag in flags]
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  start = _children_seconds()
  command = [sys.executable, '-m', f'jpeft.{module}', *flags]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert _children_seconds() - start < 10
  assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1, done.stderr
  assert not done.stdout


def _children_seconds() -> float:
  """Processor time of the subprocesses so far."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime
