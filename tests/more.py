"""Which tests the default run has room for, by the time that each of them takes.

The default run is to take about a quarter of an hour on two cores. So each module has some seconds
there: one test of each function, the quickest first, then others as far as they fit. The rest is in
`more.txt`, and has the mark `more`. It is run by `-m more`, and by naming a file or folder. After
larger changes:

    pytest -n 2 -o cache_dir=NEW_FOLDER --measure=FILE tests
    python -m tests.more FILE

A test that was not measured is in the default run.
"""

import collections
import pathlib
import re
import resource
import sys
import time
from collections.abc import Iterable

import pytest

LIST = pathlib.Path(__file__).with_name('more.txt')
SECONDS = 8.0  # of a module in the default run
ALWAYS = ('tests/contract/', 'tests/fuzz/')  # which choose by themselves


def listed() -> set[str]:
  """The tests that are left to `-m more`."""
  return set(LIST.read_text().splitlines())


def left_out(seconds: dict[str, float], budget: float = SECONDS) -> list[str]:
  """The tests that do not fit into the default run, in order.

  Args:
    seconds: {test: CPU seconds}.
    budget: seconds of a module.
  """
  modules = collections.defaultdict(list)
  for test in sorted(seconds, key=seconds.__getitem__):
    if not test.startswith(ALWAYS):
      modules[test.split('::')[0]].append(test)
  found = []
  for tests in modules.values():
    left = budget
    for test in _functions_first(tests):
      if seconds[test] <= left:
        left -= seconds[test]
      else:
        found.append(test)
  return sorted(found)


def _functions_first(tests: list[str]) -> list[str]:
  """The first test of each function, then the others."""
  firsts = {}
  for test in tests:
    firsts.setdefault(function_of(test), test)
  chosen = set(firsts.values())
  return [*firsts.values(), *(test for test in tests if test not in chosen)]


def function_of(test: str) -> str:
  """A test without its parameters."""
  return re.sub(r'\[.*', '', test, flags=re.DOTALL)


def measured(lines: Iterable[str]) -> dict[str, float]:
  """{test: seconds} of a file that `--measure` wrote; the longer time of a test that ran twice."""
  found: dict[str, float] = {}
  for line in lines:
    seconds, test = line.rstrip('\n').split('\t')
    found[test] = max(float(seconds), found.get(test, 0))
  return found


class Measure:
  """A pytest plugin that adds the CPU seconds of each test to a file, those of processes too."""

  def __init__(self, file: pathlib.Path):
    self.file = file

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item, nextitem):
    before = _seconds()
    try:
      return (yield)
    finally:
      with self.file.open('a') as file:
        file.write(f'{_seconds() - before:.3f}\t{item.nodeid}\n')


def _seconds() -> float:
  """CPU seconds of this process and of those that it started and that have ended."""
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time() + children.ru_utime + children.ru_stime


def main(files: list[str]) -> None:
  """Writes `more.txt` from the files of measured runs."""
  lines = [line for file in files for line in pathlib.Path(file).read_text().splitlines()]
  seconds = measured(lines)
  left = left_out(seconds)
  LIST.write_text(''.join(f'{test}\n' for test in left))
  rest = sum(seconds.values()) - sum(seconds[test] for test in left)
  print(f'{len(left)} of {len(seconds)} tests are left out; the others take {rest:.0f} CPU seconds')


if __name__ == '__main__':
  main(sys.argv[1:])
