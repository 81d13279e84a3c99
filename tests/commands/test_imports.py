"""A method that a config file registers: trained, and opened again by who imports that file."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
HIRA = '''

import jax
import jax.numpy as jnp

import jpeft


def mine(rank: int = 2, targets: str = '{q}|{v}', name: str = 'mine'):
  """w * (1 + a b)."""

  def init(key, w):
    return {'a': jax.random.normal(key, (w.shape[0], rank)), 'b': jnp.zeros((rank, w.shape[1]))}

  return jpeft.at(targets, jpeft.matrix(name, init, lambda t, w: w * (1 + t['a'] @ t['b'])))


jpeft.register_method('mine', mine, title='mine')
jpeft.register_metric('constant', lambda tally: 0.25)
'''


def jpeft(*words):
  """(exit code, stdout, stderr) of a command."""
  env = {'JAX_PLATFORMS': 'cpu', **os.environ}
  done = subprocess.run(
    [sys.executable, '-m', 'jpeft', *map(str, words)],
    env=env,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


def test_a_method_of_a_config_file(config_file, images, tmp_path):
  mine, run = tmp_path / 'mine.py', tmp_path / 'run'
  mine.write_text(config_file.read_text() + HIRA)
  flags = ['--config.steps=2', '--config.eval.every=2', '--config.eval.metric=constant']
  code, out, err = jpeft('train', f'--config={mine}:mine', *flags, f'--workdir={run}')
  assert code == 0 and '| mine ' in out, err
  assert json.loads((run / 'run.json').read_text())['imports'] == [str(mine.resolve())]
  assert json.loads((run / 'report.json').read_text())['best']['value'] == 0.25

  image = next((images / 'test' / 'red').iterdir())
  predict = ['predict', '--run', run, '--input', image]
  code, out, err = jpeft(*predict)
  assert code == 2 and f'registered in {mine.resolve()}: import that first' in err
  code, out, err = jpeft(*predict, '--import', mine)
  assert code == 0 and out.startswith(str(image)), err
