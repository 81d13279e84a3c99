"""What a running loop looks out for: losses that are not finite, and signals."""

import math
import signal

from jpeft.cli import Diverged


class Watch:
  """Sees that losses and gradients are finite, one update late: the device need not be waited for.

  Attributes:
    loss: the last one that is known.
  """

  def __init__(self, split: str, checkpoints):
    self.loss, self._split, self._checkpoints, self._pending = (
      float('nan'),
      split,
      checkpoints,
      None,
    )

  def see(self, number: int, indices, out: dict) -> None:
    """Takes note of an update, after a look at the one before."""
    self.catch_up()
    self._pending = number, indices, out

  def catch_up(self) -> None:
    """Looks at the last update.

    Raises:
      Diverged: its loss or gradient is not finite.
    """
    if self._pending is None:
      return
    (number, indices, out), self._pending = self._pending, None
    self.loss, norm = float(out['loss']), float(out['grad_norm'])
    if math.isfinite(self.loss) and math.isfinite(norm):
      return
    self._checkpoints.wait()
    last = self._checkpoints.latest
    raise Diverged(
      f'loss {self.loss}, gradient norm {norm} at update {number}, on the examples '
      f'{", ".join(map(str, indices))} of {self._split!r}; '
      + (f'the checkpoint of update {last} is intact' if last else 'there is no checkpoint yet')
      + '; a lower optimizer.lr or an optimizer.clip_norm may help'
    )


class Signals:
  """While open, SIGTERM and SIGINT ask for a clean end; a second one ends at once."""

  def __enter__(self):
    self.caught = None
    self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _ask(self, number, frame):
    self.caught = number
    signal.signal(number, self._before[number])

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)
