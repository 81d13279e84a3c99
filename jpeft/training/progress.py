"""The line that a run prints while it works."""

import math
import sys
import time


class Progress:
  """One line that is rewritten on a terminal; elsewhere a plain line every `every` seconds.

  Attributes:
    steps: updates in all.
    first: updates that were made before.
    every: seconds between plain lines.
    out: where the lines go, stderr if left out.
  """

  def __init__(self, steps: int, first: int, out=None, every: float = 10.0):
    self.steps = steps
    self.first = first
    self.every = every
    self.out = out or sys.stderr
    self.live = self.out.isatty()
    self.start = time.perf_counter()
    self.last = self.start
    self.width = 0

  def show(self, step: int, force: bool = False, **values: float) -> None:
    """Shows where the run is, unless the last line was just now."""
    now = time.perf_counter()
    pause = 0.1 if self.live else self.every
    if not force and now - self.last < pause:
      return
    self.last = now
    rate = (step - self.first) / max(now - self.start, 1e-9)
    left = float('inf')
    if rate:
      left = (self.steps - step) / rate
    shown = ''.join(
      f'  {name} {value:.4g}' for name, value in values.items() if not math.isnan(value)
    )
    self._put(f'step {step}/{self.steps}{shown}  {rate:.2f} steps/s  {clock(left)} left')

  def note(self, text: str) -> None:
    """Prints a line that stays."""
    if self.live and self.width:
      self.out.write('\r' + ' ' * self.width + '\r')
    self.width = 0
    self.out.write(text + '\n')
    self.out.flush()

  def _put(self, text: str) -> None:
    if not self.live:
      self.note(text)
      return
    self.out.write('\r' + text.ljust(self.width))
    self.width = len(text)
    self.out.flush()


def clock(seconds: float) -> str:
  """3:07 or 1:02:33."""
  if seconds == float('inf'):
    return '?'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if not hours:
    return f'{minutes}:{rest:02}'
  return f'{hours}:{minutes:02}:{rest:02}'
