"""Disks that take no more."""

import contextlib
import resource


@contextlib.contextmanager
def files_of(size: int):
  """No file may be longer than `size` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
