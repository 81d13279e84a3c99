"""What a face exports is there: listed by dir(), and importable."""

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

import jpeft

PACKAGES = [found.name for found in pkgutil.walk_packages(jpeft.__path__, 'jpeft.') if found.ispkg]


@pytest.mark.parametrize('name', ['jpeft', *PACKAGES])
def test_dir_lists_all_names_and_each_is_there(name):
  package = importlib.import_module(name)
  names = getattr(package, '__all__', [])
  assert set(names) <= set(dir(package))
  for listed in dir(package):
    getattr(package, listed)


def test_packages_are_attributes_of_jpeft():
  """In a process that imports nothing else, as a notebook begins."""
  names = ('config', 'data', 'decoding', 'export', 'methods', 'models', 'quant', 'training')
  code = 'import jpeft; ' + '; '.join(f'assert "{name}" in dir(jpeft)' for name in names)
  code += '; ' + '; '.join(f'assert jpeft.{name}.__name__ == "jpeft.{name}"' for name in names)
  env = {'JAX_PLATFORMS': 'cpu', **os.environ}
  subprocess.run([sys.executable, '-c', code], check=True, env=env)
