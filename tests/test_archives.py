"""Archives fetched by pip and npm: here from a folder, with no network."""

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
    file.writestr(
      'tinydata-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n'
    )
    file.writestr('tinydata-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
    file.writestr('tinydata-1.0.dist-info/RECORD', '')
  return archives.Archive(
    'tinydata', '1.0', path.name, hashlib.sha256(path.read_bytes()).hexdigest()
  )


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
  with pytest.raises(
    RuntimeError, match=f'could not download tinydata==1.0: .*; put {archive.file} into'
  ):
    archives.fetch(archive)
  (archives.cache() / archive.file).write_bytes(b'cut off')
  with pytest.raises(
    ValueError, match=f'{archive.file} has the sha256 .* expected 0000.*delete it'
  ):
    archives.fetch(archive)


@pytest.fixture
def npm(tmp_path, monkeypatch):
  """Stands in for npm: packs what lies in a folder."""
  monkeypatch.setenv('JPEFT_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'bin').mkdir()
  program = tmp_path / 'bin' / 'npm'
  program.write_text(
    '#!/bin/sh\n'
    'for last; do :; done\n'
    f'cp "{tmp_path}/$1 $2.tgz" "$last/tinydata-1.0.tgz" || {{ echo "no $2" >&2; exit 1; }}\n'
  )
  program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:/bin:/usr/bin')
  return tmp_path


def test_a_package_of_npm(npm, monkeypatch):
  content = b'any file'
  archive = archives.Archive(
    'tinydata', '1.0', 'tinydata-1.0.tgz', hashlib.sha256(content).hexdigest()
  )
  with pytest.raises(
    RuntimeError, match='npm could not download tinydata@1.0: no tinydata@1.0; put tinydata-1.0.tgz'
  ):
    archives.fetch(archive)
  (npm / 'pack tinydata@1.0.tgz').write_bytes(content)
  path = archives.fetch(archive)
  assert path == archives.cache() / 'tinydata-1.0.tgz' and path.read_bytes() == content
  monkeypatch.setenv('PATH', '')
  assert archives.fetch(archive) == path
  path.unlink()
  with pytest.raises(RuntimeError, match='there is no npm; put tinydata-1.0.tgz into'):
    archives.fetch(archive)
