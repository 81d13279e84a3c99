"""An event file of TensorBoard, each line of which is on the disk when it is written.

The SummaryWriter of tensorboardX writes in a thread of its own. On a full disk that thread ends,
and who goes on adding to its queue waits for ever. So only what makes and stores records is used.
"""

import contextlib
import pathlib
import socket
import time
from typing import Any

from jpeft.lazy import extra


class EventFile:
  """A new event file in a folder.

  Raises:
    OSError: here and in every method, where the disk takes no more; then it is closed.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int):
    """Opens it.

    Args:
      folder: of the event files of a run; made if needed.
      purge_step: what earlier files have of this step and later ones is not shown any more.
    """
    record_writer, self._summary, self._protos = parts()
    folder.mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}'
    self._file = record_writer.RecordWriter(str(folder / name))
    start = self._protos.SessionLog(status=self._protos.SessionLog.START)
    version = 'brain.Event:2'
    self._write(
      self._protos.Event(file_version=version),
      self._protos.Event(file_version=version, step=purge_step),
      self._protos.Event(session_log=start, step=purge_step),
    )

  def text(self, tag: str, text: str) -> None:
    """Adds a text in Markdown, at step 0."""
    self._write(self._protos.Event(summary=self._summary.text(tag, text)))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Adds a number for each tag."""
    made = (self._summary.scalar(tag, value) for tag, value in values.items())
    self._write(*(self._protos.Event(summary=one, step=step) for one in made))

  def close(self) -> None:
    """Closes it."""
    self._file.close()

  def _write(self, *events: Any) -> None:
    try:
      for event in events:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
      self._file.flush()
    except OSError:
      with contextlib.suppress(OSError):
        self._file.close()
      raise


def parts() -> tuple[Any, Any, Any]:
  """The modules of tensorboardX that store records, that make them, and their protocol buffers."""
  with extra('tensorboard'):
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2
  return record_writer, summary, event_pb2
