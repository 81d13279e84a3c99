"""Files that are whole or not there, and on the disk when they are there.

A file is made under a hidden name, brought to the disk and renamed, and its folder is brought to
the disk as well. So neither a kill nor a loss of power leaves a part of a file under its name. A
disk that is full or read-only is told in one sentence.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

# What a disk says that takes no more, and what it means.
_REASONS = {
  errno.ENOSPC: 'the disk is full',
  errno.EDQUOT: 'the quota of the disk is used up',
  errno.EFBIG: 'it would be longer than files may be (ulimit -f)',
  errno.EROFS: 'the file system is read-only',
  errno.EIO: 'the disk reports an error',
}
# Of these, files that are being read may be as guilty.
_OF_PERMISSIONS = {
  errno.EACCES: 'permission denied',
  errno.EPERM: 'operation not permitted',
}
# How libraries that are not written in Python name them, such as tensorstore and safetensors.
_NUMBER = re.compile(r"\bos[ _]error(?:_code)?[ =]'?(\d+)", re.IGNORECASE)
# Of file systems that cannot bring a folder to the disk.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)

PART = '.part'  # in the hidden name of what is not whole yet


class NotWritten(OSError):
  """A file cannot be written: one sentence that names it and says why."""


def reason_of(error: BaseException) -> str | None:
  """Why the disk takes no more, if that is what an error of any library is about; else None."""
  number = error.errno if isinstance(error, OSError) else None
  if number is None:
    named = _NUMBER.search(str(error))
    if named is not None:
      number = int(named.group(1))
  return _REASONS.get(number)


@contextlib.contextmanager
def told(path: pathlib.Path, permissions: bool = False) -> Iterator[None]:
  """Makes of an error of the disk a NotWritten that names `path`.

  Args:
    path: what is written meanwhile.
    permissions: whether nothing else is read or written meanwhile, so that a missing permission is
      one to write this.
  """
  try:
    yield
  except NotWritten:
    raise
  except Exception as error:
    reason = reason_of(error)
    if reason is None and permissions and isinstance(error, OSError):
      reason = _OF_PERMISSIONS.get(error.errno)
    if reason is None:
      raise
    raise NotWritten(f'{path} cannot be written: {reason}') from error


# ---- Files.


def write(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file as a whole or not at all.

  Args:
    path: of the file; one that is there is replaced.
    content: text is written as UTF-8.

  Raises:
    NotWritten: the disk is full, or the like.
  """
  if isinstance(content, str):
    content = content.encode()
  with told(path, permissions=True), appearing(path) as part:
    part.write_bytes(content)


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Where to write a file that gets its name, `path`, when the block has ended; it goes if not.

  Raises:
    NotWritten: the disk is full, or the like.
  """
  part = path.with_name(f'.{path.stem}{PART}{path.suffix}')  # libraries go by the suffix
  with told(path):
    try:
      yield part
      sync(part)
      os.replace(part, path)
      sync(path.parent)
    finally:
      part.unlink(missing_ok=True)


def append(path: pathlib.Path, text: str) -> None:
  """Adds to a text file, all or nothing.

  Raises:
    NotWritten: the disk is full, or the like.
  """
  rest = text.encode()
  # Without a buffer, which would be written once more when the file is closed.
  with told(path, permissions=True), path.open('ab', buffering=0) as file:
    before = file.seek(0, os.SEEK_END)
    try:
      while rest:
        rest = rest[file.write(rest) :]
      os.fsync(file.fileno())
    except OSError:
      file.truncate(before)
      raise


def remove_parts(folder: pathlib.Path) -> None:
  """Removes what a kill has left of files that were being made in a folder."""
  for left in folder.glob(f'.*{PART}*'):
    if left.is_file():
      left.unlink(missing_ok=True)


def sync(path: pathlib.Path) -> None:
  """Returns when a file, or the list of the files of a folder, is on the disk."""
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  except OSError as error:
    if not path.is_dir() or error.errno not in _NO_SYNC:
      raise
  finally:
    os.close(number)


def sync_tree(folder: pathlib.Path) -> None:
  """`sync` of a folder and of all that is in it."""
  for path in folder.rglob('*'):
    sync(path)
  sync(folder)


# ---- Folders.


@contextlib.contextmanager
def filled(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Where to write files of a folder: they get there together when the block has ended.

  They are made in a hidden folder inside, since a folder may be where a disk is mounted. If the
  block raises, nothing of them is left.

  Args:
    folder: is made if needed; files in it that have the same names are replaced.

  Raises:
    NotWritten: the disk is full, or the like.
  """
  made = not folder.exists()
  part = folder / PART
  with told(folder):
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
      yield part
      sync_tree(part)
      for path in sorted(part.iterdir()):
        os.rename(path, folder / path.name)
      part.rmdir()
      sync(folder)
      sync(folder.absolute().parent)
    except BaseException:
      shutil.rmtree(part, ignore_errors=True)
      if made:
        with contextlib.suppress(OSError):  # others may have put something there
          folder.rmdir()
      raise
