"""What a user gets: the source archive, a wheel of it with base dependencies, an editable clone."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests.install.test_without_extras import check

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ('jpeft', 'pallas_kernels', 'configs', 'docs', 'colabs', 'tests')
FILES = ('pyproject.toml', 'MANIFEST.in', 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE')
FILES += ('CITATION.cff', 'Makefile', 'mkdocs.yml')
BUILD = 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])'
WHERE = 'import jpeft; jpeft.load, jpeft.lora, jpeft.data; print(jpeft.__file__)'

pytestmark = pytest.mark.slow


def run(*command, cwd: pathlib.Path) -> str:
  """What a command prints; it must end well."""
  env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  env |= {'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> pathlib.Path:
  """A copy of the repository, called jpeft, in a folder that is somebody's working directory."""
  folder = tmp_path_factory.mktemp('notebooks') / 'jpeft'
  folder.mkdir()
  for name in SOURCES:
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
  for name in FILES:
    shutil.copy(ROOT / name, folder)
  return folder


@pytest.fixture(scope='module')
def python(tmp_path_factory) -> pathlib.Path:
  """The interpreter of a fresh virtual environment."""
  folder = tmp_path_factory.mktemp('environment')
  run(sys.executable, '-m', 'venv', folder, cwd=folder)
  found = folder / 'bin' / 'python'
  run(found, '-m', 'pip', 'install', '-q', 'setuptools>=77', cwd=folder)
  return found


@pytest.fixture(scope='module')
def archive(python, clone, tmp_path_factory) -> pathlib.Path:
  """The source archive, built in the clone."""
  folder = tmp_path_factory.mktemp('dist')
  run(python, '-c', BUILD, folder, cwd=clone)
  (found,) = folder.glob('jpeft-*.tar.gz')
  return found


def test_the_archive_has_all_that_the_repository_has(archive):
  with tarfile.open(archive) as opened:
    names = {name.partition('/')[2] for name in opened.getnames()}
  for folder in SOURCES:
    files = {str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob('*') if file.is_file()}
    kept = {file for file in files if '__pycache__' not in file}
    assert kept <= names, kept - names
  assert set(FILES) <= names


def test_a_wheel_then_a_clone(python, archive, clone, folders, script, tmp_path):
  """In turn, in one environment: what a wheel with base dependencies does, then a clone."""
  pip = (python, '-m', 'pip', 'install', '-q', '--no-build-isolation')
  run(*pip, archive, cwd=tmp_path)
  site = pathlib.Path(run(python, '-c', WHERE, cwd=tmp_path).strip())
  assert 'site-packages' in site.parts
  assert {file.name for file in (site.parent / '_configs').glob('*.py')} >= {'quickstart.py'}
  check(json.loads(run(python, script, *folders, cwd=tmp_path)))
  console = python.with_name('jpeft')
  assert 'method.rank=8' in run(console, 'config', 'quickstart:lora', cwd=tmp_path)
  # Beside a clone, whose folder of the same name is no package.
  assert run(python, '-c', WHERE, cwd=clone.parent).strip() == str(site)

  run(*pip, '--no-deps', '-e', clone, cwd=tmp_path)
  own = str(clone / 'jpeft' / '__init__.py')
  assert run(python, '-c', WHERE, cwd=clone.parent).strip() == own
  assert run(python, '-c', WHERE, cwd=tmp_path).strip() == own
  assert 'method.rank=8' in run(console, 'config', 'quickstart:lora', cwd=tmp_path)
