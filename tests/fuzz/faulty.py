"""Readers that do what readers must not, to see that it is told."""

import os
import time

from tests.fuzz.reader import Reader

_FILES = [{'a.txt': b'whole'}]


def _when_damaged(do):
  def read(folder):
    if (folder / 'a.txt').read_bytes() != b'whole':
      do(folder)

  return read


def _raise(folder):
  raise KeyError('x')


def _silent(folder):
  raise ValueError('something is wrong')


def _hang(folder):
  time.sleep(1000)


def _fill(folder):
  bytes(3 * 10**9)


def _end(folder):
  os._exit(1)


def _sound(folder):
  raise ValueError(f'{folder / "a.txt"} is not whole')


_DOES = {
  'raises': _raise,
  'names nothing': _silent,
  'fills the memory': _fill,
  'ends': _end,
  'is sound': _sound,
  'hangs': _hang,
}
READERS = {
  name: Reader(name, _when_damaged(do), lambda: _FILES, 'a.txt') for name, do in _DOES.items()
}
