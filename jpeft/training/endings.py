"""What ends a run from outside, told with where the run goes on."""

import contextlib
import pathlib
import signal
from collections.abc import Callable, Iterator

from jpeft import cli, writing

from . import hosts
from .checkpoints import steps_of


@contextlib.contextmanager
def resumable(folder: pathlib.Path) -> Iterator[None]:
  """Makes one sentence of what ends the run in `folder` at once.

  Raises:
    cli.Stopped: Ctrl-C, before the first update or a second time.
    cli.Mistake: the disk takes no more.
  """
  try:
    yield
  except KeyboardInterrupt as error:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends what is still at work
    raise cli.Stopped(signal.SIGINT, goes_on(folder)) from error
  except writing.NotWritten as error:
    raise cli.Mistake(f'{error}; {goes_on(folder)}') from error


@contextlib.contextmanager
def written_together(folder: pathlib.Path) -> Iterator[None]:
  """What is written of the run in `folder`: a disk that takes no more ends all processes.

  What is done inside must not wait for other processes.

  Raises:
    cli.Mistake: the disk of one of several processes takes no more.
  """
  if not hosts.several():
    yield
    return
  with hosts.together():
    try:
      yield
    except writing.NotWritten as error:
      raise cli.Mistake(f'{error}; {goes_on(folder)}') from error


@contextlib.contextmanager
def saved_first(folder: pathlib.Path, *steps: Callable[[], object], skips: bool) -> Iterator[None]:
  """Where examples are read: before a broken one ends the run in `folder`, its updates are stored.

  Args:
    folder: of the run.
    *steps: called one after the other, to store them.
    skips: whether the run skips broken examples already.

  Raises:
    cli.Mistake: an example cannot be read.
  """
  try:
    yield
  except cli.Mistake as error:
    if hosts.several() and not isinstance(error, hosts.Everywhere):
      raise  # the others do not know, and do not store anything
    for step in steps:
      step()
    rest = goes_on(folder)
    if not skips:
      rest += ', and with --config.data.on_error=skip it skips such examples'
    raise type(error)(f'{error}; {rest}') from error


def goes_on(folder: pathlib.Path) -> str:
  """Where the same command goes on with the run in `folder`."""
  steps = steps_of(folder / 'checkpoints')
  if not steps:
    return 'there is no checkpoint yet; the same command starts again'
  return f'the same command goes on from checkpoint {steps[-1]}'
