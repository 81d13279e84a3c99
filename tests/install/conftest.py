"""What is laid before an interpreter without the extras."""

import pathlib

import pytest

from jpeft import training


@pytest.fixture(scope='session')
def folders(backbone, decoder, images, load_once, tmp_path_factory) -> list[str]:
  """The arguments of without_extras.py."""
  run = tmp_path_factory.mktemp('runs') / 'lora'
  training.train(load_once, run)
  return [str(path) for path in (backbone, decoder, run, images)]


@pytest.fixture(scope='session')
def load_once(config_file):
  from jpeft import config

  return config.load(f'{config_file}:lora', {'steps': '1', 'eval.every': 'none'})


@pytest.fixture
def script() -> pathlib.Path:
  return pathlib.Path(__file__).with_name('without_extras.py')
