"""What a running loop watches for: losses that are not finite, and signals."""

import math
import signal

from jpeft.cli import Diverged


class Watch:
  """Checks that loss and gradient norm are finite.

  It reads the values of the previous update, so that the check never blocks on the device.

  Attributes:
    loss: of the last update that was checked.
  """

  def __init__(self, split: str, checkpoints):
    self.loss = float('nan')
    self._split = split
    self._checkpoints = checkpoints
    self._pending = None

  def add(self, number: int, indices, out: dict) -> None:
    """Checks the update before, and notes this one to be checked next.

    Args:
      number: of the update.
      indices: of its examples.
      out: what its `train_step` returned.
    """
    self.check()
    self._pending = number, indices, out

  def check(self) -> None:
    """Checks the last update.

    Raises:
      Diverged: its loss or gradient is not finite.
    """
    if self._pending is None:
      return
    number, indices, out = self._pending
    self._pending = None
    self.loss = float(out['loss'])
    norm = float(out['grad_norm'])
    if math.isfinite(self.loss) and math.isfinite(norm):
      return
    self._checkpoints.wait()
    last = self._checkpoints.latest
    rest = 'there is no checkpoint yet'
    if last:
      rest = f'the checkpoint of update {last} is intact'
    raise Diverged(
      f'loss {self.loss}, gradient norm {norm} at update {number}, on the examples '
      f'{", ".join(map(str, indices))} of {self._split!r}; {rest}; '
      'a lower optimizer.lr or an optimizer.clip_norm may help'
    )


# What asks for an end: kill, Ctrl-C, a terminal or a connection that is closed, and what batch
# systems send some time before they kill.
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
  """While it is open, signals ask for a clean end; a second one of the same kind ends at once.

  A signal that is ignored, as `nohup` does with SIGHUP, stays so.

  Attributes:
    caught: the number of the signal that came; None before.
  """

  def __enter__(self):
    self.caught = None
    heard = [s for s in ASKING if signal.getsignal(s) is not signal.SIG_IGN]
    self._before = {s: signal.signal(s, self._note) for s in heard}
    return self

  def _note(self, number, frame):
    self.caught = number
    signal.signal(number, self._before[number])

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)
