"""The line that a run prints while it works."""

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator


class Progress:
  """One line that is rewritten on a terminal; elsewhere a plain line every `every` seconds.

  Where nothing can be written any more, as to a terminal that was closed, the work goes on.

  Attributes:
    every: seconds between plain lines.
    out: where the lines go, stderr if left out.
    live: whether one line is rewritten; if left out, on a terminal alone.
  """

  def __init__(self, out=None, every: float = 10.0, live: bool | None = None):
    self.every = every
    self.out = out or sys.stderr
    self.live = self.out.isatty() if live is None else live
    self._last = time.perf_counter()  # when a line was shown
    self._width = 0  # of the line that is to be rewritten

  def stage(self, name: str, total: int | None = None, done: int = 0) -> 'Stage':
    """A part of the work.

    Args:
      name: of what is counted, or of the part itself, which a terminal then shows at once.
        Elsewhere it is not told: a mistake that is found in it stays the only line.
      total: how many there are; None if it cannot be counted.
      done: how many of them were done before.
    """
    if total is None and self.live:
      self.put(name)
    return Stage(self, name, total, done)

  def note(self, text: str) -> None:
    """Prints a line that stays."""
    if self.live and self._width:
      text = '\r' + ' ' * self._width + '\r' + text
    self._width = 0
    self._write(text + '\n')

  def put(self, text: str) -> None:
    """Shows a line; on a terminal the next one takes its place."""
    self._last = time.perf_counter()
    if not self.live:
      self.note(text)
      return
    self._write('\r' + text.ljust(self._width))
    self._width = len(text)

  def is_due(self) -> bool:
    """Whether the last line was shown long enough ago."""
    pause = 0.1 if self.live else self.every
    return time.perf_counter() - self._last >= pause

  def close(self) -> None:
    """Ends a line that would be rewritten: what is printed next stands below it."""
    if self._width:
      self._write('\n')
    self._width = 0

  def _write(self, text: str) -> None:
    with contextlib.suppress(OSError):
      self.out.write(text)
      self.out.flush()


class Stage:
  """A part of the work, which is counted.

  The time left follows from the time between the first that was done and the last: the first waits
  for compilers, threads and files, and says nothing of the others.

  Attributes:
    done: how many are done.
    total: how many there are; None if they cannot be counted.
  """

  def __init__(self, progress: Progress, name: str, total: int | None, done: int):
    self.done = done
    self._progress = progress
    self._name = name
    self.total = total
    self._first: tuple[int, float] | None = None  # (how many, when) the first time that some were

  def add(self, count: int, **values: float) -> None:
    """Shows that `count` more are done."""
    self.show(self.done + count, **values)

  def show(self, done: int, force: bool = False, **values: float) -> None:
    """Shows that `done` are done, unless the last line was just now.

    Args:
      done: of the total, with those of before.
      force: show it however short ago the last line was.
      **values: shown beside it; those that are not a number are left out. They are read only when a
        line is due, so that an array on a device may go on being computed.
    """
    self.done = done
    if self._first is None:
      self._first = done, time.perf_counter()
    if force or self._progress.is_due():
      self._progress.put(self.line(**values))

  def line(self, **values: float) -> str:
    """Name, count, values, pace and time left."""
    parts = [f'{self._name} {self.done:,}/{self.total:,}']
    for name, value in values.items():
      value = float(value)
      if not math.isnan(value):
        parts.append(f'{name} {value:.4g}')
    seconds = self.seconds_each()
    if seconds is not None:
      parts += [pace(seconds), f'{clock((self.total - self.done) * seconds)} left']
    return '  '.join(parts)

  def seconds_each(self) -> float | None:
    """Measured seconds of one; None until more than the first are done."""
    if self._first is None:
      return None
    done, since = self._first
    if self.done <= done:
      return None
    return (time.perf_counter() - since) / (self.done - done)


def counted(batches: Iterable, size: int, stage: Stage) -> Iterator:
  """The batches; each one is shown as `size` done when the next is asked for, the last as all."""
  for batch in batches:
    yield batch
    stage.show(min(stage.done + size, stage.total))


def pace(seconds: float) -> str:
  """3.2 s each or 12.5/s."""
  if seconds > 1:
    return f'{seconds:.1f} s each'
  return f'{1 / max(seconds, 1e-9):.1f}/s'


def clock(seconds: float) -> str:
  """3:07 or 1:02:33."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if not hours:
    return f'{minutes}:{rest:02}'
  return f'{hours}:{minutes:02}:{rest:02}'
