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

SECONDS = 20  # that a case may take
START = 180  # that the imports may take
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


def watched(counts: dict[str, int]) -> dict[str, Told]:
  """{reader: what became of its first cases} of {reader: how many}."""
  told = {name: Told(count, [], [], [], []) for name, count in counts.items()}
  jobs = [(name, 0, count) for name, count in counts.items()]
  while jobs:
    jobs = _round(jobs, told)
  return told


def _round(jobs: list[tuple[str, int, int]], told: dict[str, Told]) -> list[tuple[str, int, int]]:
  """Runs jobs in one process; returns those that are left after one that hung or ended it."""
  words = [str(word) for job in jobs for word in job]
  # Frames of Rust code and the words of readers go nowhere: there are millions.
  process = subprocess.Popen(
    [sys.executable, '-m', 'tests.fuzz.run', *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    errors='replace',
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'RUST_BACKTRACE': '0'},
  )
  lines: queue.Queue = queue.Queue()

  def pump():
    for line in process.stdout:
      lines.put(line.rstrip('\n'))
    lines.put(None)

  threading.Thread(target=pump, daemon=True).start()
  now: tuple[str, int] | None = None
  hung = False
  while True:
    try:
      line = lines.get(timeout=SECONDS if now else START)
    except queue.Empty:
      process.kill()
      hung = True
      break
    if line is None or line == 'done':
      break
    case, colon, wrong = line.partition(': ')
    name, _, number = case.rpartition(' ')
    if not colon:
      now = name, int(number)
      continue
    kind = told[name].memory if wrong.startswith('MemoryError') else told[name].errors
    kind.append(line)
  process.stdout.close() if not hung else None
  process.wait()
  if line == 'done':
    return []
  if now is None:
    raise RuntimeError(f'the process of {jobs[0][0]} ended before its first case')
  name, number = now
  if number < 0:
    raise RuntimeError(f'the undamaged files of {name} are not read: python -m tests.fuzz.run')
  place = told[name].hangs if hung else told[name].ends
  place.append(f'{name} {number}: {"takes too long" if hung else "ends the process"}')
  at = next(i for i, job in enumerate(jobs) if job[0] == name)
  return [(name, number + 1, jobs[at][2]), *jobs[at + 1 :]]


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
