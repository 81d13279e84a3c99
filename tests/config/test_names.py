"""Configs that come with jpeft, by name, from any folder."""

import pathlib

import pytest

from jpeft import config

FOLDER = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  """A working directory without configs."""
  monkeypatch.chdir(tmp_path)


def test_they_are_those_of_the_repository():
  found = config.packaged()
  assert set(found) == {file.stem for file in FOLDER.glob('*.py')}
  for name, file in found.items():
    assert file.read_text() == (FOLDER / f'{name}.py').read_text()


@pytest.mark.parametrize('name', config.packaged())
def test_a_name_stands_for_the_file(name):
  for argument in ('', ':lora'):
    by_name = config.load(f'{name}{argument}')
    assert config.differences(by_name, config.load(f'{FOLDER / name}.py{argument}')) == []


def test_folder_baseline_and_argument():
  command = config.parse(['--config=quickstart:lora', '--config.epochs=1'])
  assert str(command.folder()) == 'runs/quickstart-lora' and command.takes_argument
  assert command.baseline('linear').reference == 'quickstart:linear'
  assert command.load().epochs == 1.0


def test_a_wrong_name_is_told_with_the_nearest(tmp_path):
  with pytest.raises(FileNotFoundError, match="'quikstart'; did you mean 'quickstart'"):
    config.load('quikstart:lora')
  (tmp_path / 'mine.py').write_text('')
  with pytest.raises(FileNotFoundError, match="did you mean 'mine.py'"):
    config.load('mine')
  with pytest.raises(FileNotFoundError, match='there is no config file emoji.py'):
    config.load('emoji.py')
