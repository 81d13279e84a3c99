"""A run goes on with what `--allow` names, and with nothing else."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft import cli, training
from jpeft.training import checkpoints
from tests.training import killing


@pytest.fixture(scope='module')
def stopped(config_file, tmp_path_factory):
  """stopped(monkeypatch) -> the folder of a run of 12 updates that a signal ended."""
  from jpeft import config

  made = []

  def get(monkeypatch):
    if not made:
      folder = tmp_path_factory.mktemp('stopped') / 'run'
      with monkeypatch.context() as patch:
        killing.interrupt(patch, 5)
        with pytest.raises(cli.Stopped):
          training.train(config.load(f'{config_file}:linear'), folder)
      made.append(folder)
    return made[0]

  return get


def told_by(folder, name='report.json'):
  return json.loads((folder / name).read_text())


def test_another_mesh_and_places_give_the_same_theta(
  stopped, load, backbone, images, tmp_path, monkeypatch, capsys
):
  folder = shutil.copytree(stopped(monkeypatch), tmp_path / 'run')
  made = max(checkpoints.steps_of(folder / 'checkpoints'))
  shutil.copytree(backbone, tmp_path / 'weights')
  shutil.copytree(images, tmp_path / 'images')
  other = {
    'mesh.data': 2,
    'model.source': tmp_path / 'weights',
    'data.name': f'folder:{tmp_path / "images"}',
    'log.every': 3,
  }
  config = load('linear', **other)
  with pytest.raises(cli.Mistake, match='holds a run with another config: data.name .* or --allow'):
    training.train(config, folder)
  with pytest.raises(
    cli.Mistake, match=r'config: log.every \(3 here, 2 there\)\. .* or --allow=log'
  ):
    training.train(config, folder, ['mesh', 'model.source', 'data.name'])
  capsys.readouterr()
  told = training.train(config, folder, ['mesh', 'model.source', 'data.name', 'log'])
  whole = training.train(load('linear'), tmp_path / 'whole')
  a, b = (load_file(f / 'theta.safetensors') for f in (folder, tmp_path / 'whole'))
  for name, x in a.items():
    np.testing.assert_allclose(x, b[name], atol=1e-6)
  assert whole['steps'] == told['steps'] and 'changes' not in whole

  assert told['changes'] == [
    {
      'after': made,
      'changed': {
        'data.name': [f'folder:{images}', other['data.name']],
        'log.every': [2, 3],
        'mesh.data': [1, 2],
        'model.source': [str(backbone), str(tmp_path / 'weights')],
      },
    }
  ]
  line = f'data.name folder:{images} -> {other["data.name"]}, log.every 2 -> 3, mesh.data 1 -> 2'
  assert f'changed after {made} updates: {line}' in capsys.readouterr().err
  assert f'- changed after {made} updates: {line}' in (folder / 'report.md').read_text()
  # It is now a run of the new values: what opens it finds the weights there.
  shutil.rmtree(tmp_path / 'images')
  assert training.describe(folder)[0].model.source == str(tmp_path / 'weights')
  assert training.train(config, folder) == told


def test_a_complete_run_goes_on_to_more_updates(load, tmp_path):
  settings = {'schedule.name': 'constant', 'eval.every': 4}
  folder = tmp_path / 'run'
  training.train(load('linear', **settings, steps=8), folder)
  longer = load('linear', **settings, steps=16)
  with pytest.raises(cli.Mistake, match=r'steps \(16 here, 8 there\).* or --allow=steps to go on'):
    training.train(longer, folder)
  told = training.train(longer, folder, ['steps'])
  assert told['steps'] == 16
  assert told['changes'] == [{'after': 8, 'changed': {'steps': [8, 16]}}]
  # With a constant rate this is the run that was that long from the start.
  whole = training.train(longer, tmp_path / 'whole')
  assert told['theta_sha256'] == whole['theta_sha256']
  with pytest.raises(cli.Mistake, match='has made 16 updates, and is to have 12: give more'):
    training.train(load('linear', **settings, steps=12), folder, ['steps'])
  assert told_by(folder, 'config.json')['steps'] == 16


def test_what_makes_another_run_of_it_is_never_allowed(
  stopped, load, images, tmp_path, monkeypatch
):
  folder = shutil.copytree(stopped(monkeypatch), tmp_path / 'run')
  for name in ('optimizer.lr', 'seed', 'data.batch_size', 'data', 'method'):
    with pytest.raises(cli.Mistake, match=f'--allow={name} is none of mesh, hosts, data.name'):
      training.train(load('linear', **{'optimizer.lr': 3}), folder, [name])
  with pytest.raises(cli.Mistake, match=r'another config: optimizer.lr \(3.0 here.*with that run$'):
    training.train(load('linear', **{'optimizer.lr': 3}), folder, ['mesh', 'steps'])
  other = load('linear', **{'data.name': f'folder:{images}?files=list'})
  with pytest.raises(cli.Mistake, match='differs from .* in more than the path'):
    training.train(other, folder, ['data.name'])


def test_other_weights_at_another_place_are_refused(stopped, load, backbone, tmp_path, monkeypatch):
  folder = shutil.copytree(stopped(monkeypatch), tmp_path / 'run')
  before = told_by(folder, 'config.json'), told_by(folder, 'run.json')
  weights = tmp_path / 'weights'
  shutil.copytree(backbone, weights)
  arrays = load_file(weights / 'model.safetensors')
  name = next(name for name in arrays if name.endswith('query.weight'))
  arrays[name] += 1
  save_file(arrays, weights / 'model.safetensors')
  with pytest.raises(cli.Mistake, match='was begun with other backbone_sha256'):
    training.train(load('linear', **{'model.source': weights}), folder, ['model.source'])
  # The command of before is still that of the run.
  assert before == (told_by(folder, 'config.json'), told_by(folder, 'run.json'))


def test_another_number_of_processes_is_allowed_by_name(stopped, load, tmp_path, monkeypatch):
  folder = shutil.copytree(stopped(monkeypatch), tmp_path / 'run')
  info = told_by(folder, 'run.json')
  assert info['processes'] == 1
  (folder / 'run.json').write_text(json.dumps(info | {'processes': 4}))
  with pytest.raises(cli.Mistake, match='begun by 4 processes, and these are 1: .*--allow=hosts'):
    training.train(load('linear'), folder, ['mesh'])
  told = training.train(load('linear'), folder, ['hosts'])
  assert told['changes'][0]['changed'] == {'hosts': [4, 1]}
  assert told_by(folder, 'run.json')['processes'] == 1
