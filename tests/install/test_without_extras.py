"""Base dependencies alone: all commands start, and what is missing is told by its extra."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# An interpreter in which the packages of argv[1] cannot be imported; it runs the script argv[2].
BLOCKED = """
import importlib.abc, runpy, sys

class Blocked(importlib.abc.MetaPathFinder):
  names = frozenset(sys.argv[1].split(','))

  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in self.names:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, %r)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
# Of the extras, what is imported by another name than the package has.
IMPORTED = {'pillow': 'PIL', 'mlflow-skinny': 'mlflow'}


def extras() -> set[str]:
  """The names by which the packages of the extras are imported, but for those of JAX."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  found = set()
  for packages in project['optional-dependencies'].values():
    for package in packages:
      name = package.partition('>')[0].partition('=')[0].partition('[')[0]
      found.add(IMPORTED.get(name, name).replace('-', '_'))
  return found - {'jpeft', 'jax'}


@pytest.fixture(scope='module')
def said(folders, tmp_path_factory) -> dict[str, tuple[int, str]]:
  script = pathlib.Path(__file__).with_name('without_extras.py')
  blocked = ','.join(sorted(extras()))
  done = subprocess.run(
    [sys.executable, '-c', BLOCKED % str(ROOT), blocked, script, *folders],
    env={'JAX_PLATFORMS': 'cpu', **os.environ},
    cwd=tmp_path_factory.mktemp('base'),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_the_extras_are_blocked():
  assert {'PIL', 'tokenizers', 'tensorflow_datasets', 'matplotlib'} <= extras()


def check(said: dict[str, tuple[int, str]]) -> None:
  """Checks what without_extras.py prints."""
  works = ('compile', 'write weights', 'write adapter', 'list', 'values', 'load', 'attach')
  missing = {
    'images': 'quickstart',
    'events': 'tensorboard',
    'wandb': 'wandb',
    'mlflow': 'mlflow',
    'texts': 'llm',
    'scores': 'scores',
    'packaged': 'quickstart',
    'tables': 'datasets',
    'plot': 'plan',
    'write text': 'llm',
    'label': 'quickstart',
    'hub': 'hub',
  }
  for what, (code, text) in said.items():
    if what not in missing:
      assert code in (0, None), (what, text)
      continue
    assert code == 2, (what, text)
    sentence = text.splitlines()[-1]
    assert f"pip install 'jpeft[{missing[what]}]'" in sentence, (what, text)
    assert 'Traceback' not in text, text
  assert {*works, *missing, 'train', 'plan', 'bench memory', 'generate'} <= set(said)
  assert said['load'][1] == '(2, 16)'
  assert float(said['attach'][1]) > 0.1
  assert 'optimizer.lr=0.003' in said['values'][1] and '--config' in said['train'][1]


def test_commands_and_sentences(said):
  check(said)
