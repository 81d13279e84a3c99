"""Starts `tests.fuzz.run`, and says what became of each case; prints a table of all readers.

python -m tests.fuzz.watch [COUNT [NAME ...]]
"""

import collections
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

SECONDS = 60  # that a case may take
START = 180  # that the imports may take
HUNG = 'hung'
Job = tuple[str, int, int]  # reader, first case, the one behind the last
HEAD = ('reader', 'cases', 'other exceptions', 'hangs', 'above 2 GB', 'ends of the process')


class Told(NamedTuple):
  """What became of the cases of a reader.

  Attributes:
    cases: how many were read.
    errors: those with another exception than allowed, with what it was.
    hangs: those that took too long.
    memory: those that needed more than 2 GB.
    ends: those that ended the process.
  """

  cases: int
  errors: list[str]
  hangs: list[str]
  memory: list[str]
  ends: list[str]

  @property
  def wrong(self) -> list[str]:
    return [*self.errors, *self.hangs, *self.memory, *self.ends]


def watched(
  counts: dict[str, int], module: str = 'tests.fuzz.readers', seconds: float = SECONDS
) -> dict[str, Told]:
  """{reader: what became of its first cases}.

  Args:
    counts: {reader: how many}.
    module: that has the readers.
    seconds: that a case may take.
  """
  return told_of([(name, 0, count) for name, count in counts.items()], module, seconds)


def told_of(
  jobs: list[Job], module: str = 'tests.fuzz.readers', seconds: float = SECONDS
) -> dict[str, Told]:
  """The same of jobs: a reader, its first case, and the one behind its last."""
  told: dict[str, Told] = {}
  for name, first, end in jobs:
    before = told.get(name, Told(0, [], [], [], []))
    told[name] = before._replace(cases=before.cases + end - first)
  while jobs:
    jobs = _round(jobs, told, module, seconds)
  return told


def _round(jobs: list[Job], told: dict[str, Told], module: str, seconds: float) -> list[Job]:
  """Runs jobs in one process; returns those that are left after one that hung or ended it."""
  now = None
  with _Process(module, jobs) as process:
    line = process.line(START)
    while line not in (None, 'done', HUNG):
      case, colon, wrong = line.partition(': ')
      name, _, number = case.rpartition(' ')
      if not colon:
        now = name, int(number)
      elif wrong.startswith('MemoryError'):
        told[name].memory.append(line)
      else:
        told[name].errors.append(line)
      line = process.line(START if now[1] < 0 else seconds)
  if line == 'done':
    return []
  if now is None or now[1] < 0:
    raise RuntimeError(f'whole files are not read: python -m tests.fuzz.run {module} {jobs[0][0]}')
  name, number = now
  if line == HUNG:
    told[name].hangs.append(f'{name} {number}: takes more than {seconds} seconds')
  else:
    told[name].ends.append(f'{name} {number}: ends the process')
  at = next(i for i, job in enumerate(jobs) if job[0] == name and job[1] <= number < job[2])
  return [(name, number + 1, jobs[at][2]), *jobs[at + 1 :]]


class _Process:
  """A process of `tests.fuzz.run`, whose lines are read one by one."""

  def __init__(self, module: str, jobs: list[Job]):
    words = [str(word) for job in jobs for word in job]
    # The words of Rust code go nowhere: there are millions.
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.fuzz.run', module, *words],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      errors='replace',
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'RUST_BACKTRACE': '0'},
    )
    self._lines: queue.Queue = queue.Queue()
    self._reads = threading.Thread(target=self._pump)
    self._reads.start()

  def _pump(self) -> None:
    for line in self._process.stdout:
      self._lines.put(line.rstrip('\n'))
    self._lines.put(None)

  def line(self, seconds: float) -> str | None:
    """The next line; HUNG if none comes in time, None at the end."""
    try:
      return self._lines.get(timeout=seconds)
    except queue.Empty:
      return HUNG

  def __enter__(self) -> '_Process':
    return self

  def __exit__(self, *error) -> None:
    self._process.kill()
    self._process.wait()
    self._reads.join()
    self._process.stdout.close()


def table(told: dict[str, Told]) -> list[Sequence[str]]:
  """Rows of reader, cases, other exceptions, hangs, above 2 GB, ends of the process."""
  rows: list[Sequence[str]] = [HEAD]
  for name, found in told.items():
    counts = (found.errors, found.hangs, found.memory, found.ends)
    rows.append((name, f'{found.cases:,}', *(str(len(kind)) for kind in counts)))
  return rows


def main(argv: list[str]) -> None:
  from jpeft.messages import markdown
  from tests.fuzz.readers import READERS

  count = int(argv[0]) if argv else 2000
  names = argv[1:] or list(READERS)
  told = watched({name: READERS[name].count(count) for name in names})
  head, *rows = table(told)
  print(markdown(head, rows))
  for found in told.values():
    kinds = collections.Counter(line.partition(': ')[2] for line in found.wrong)
    first = {line.partition(': ')[2]: line.partition(': ')[0] for line in reversed(found.wrong)}
    for wrong, times in kinds.most_common(12):
      print(f'{first[wrong]} ({times} times): {wrong}')


if __name__ == '__main__':
  main(sys.argv[1:])
