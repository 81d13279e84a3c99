"""Command lines: mistakes told in one sentence, exit codes, the flags that commands share."""

import argparse
import contextlib
import pathlib
import signal
import sys
from collections.abc import Callable


class Mistake(Exception):
  """What the user can put right: told in one sentence, exit code 2."""


class Stopped(Exception):
  """A signal ended the run after a checkpoint: exit code 128 + its number, as a shell counts."""

  def __init__(self, number: int, where: str):
    super().__init__(f'stopped by {signal.Signals(number).name}; {where}')
    self.code = 128 + number


class Diverged(Exception):
  """A loss or gradient is not finite: exit code 1."""


@contextlib.contextmanager
def inputs_checked():
  """Within it, what is raised about files, values and missing packages is a Mistake."""
  try:
    yield
  except (ValueError, OSError, RuntimeError, ImportError) as error:
    raise Mistake(' '.join(str(error).split())) from error


def command(name: str, main: Callable[[list[str]], int]) -> int:
  """Runs a command line: mistakes are one sentence on stderr; --traceback shows where they
  arose.
  """
  argv = [a for a in sys.argv[1:] if a != '--traceback']
  try:
    return main(argv)
  except (Mistake, Stopped, Diverged) as error:
    if '--traceback' in sys.argv:
      raise
    print(f'{name}: {"" if isinstance(error, Stopped) else "error: "}{error}', file=sys.stderr)
    return error.code if isinstance(error, Stopped) else 2 if isinstance(error, Mistake) else 1


def parser(name: str, doc: str, out: bool = False) -> argparse.ArgumentParser:
  """The flags of a command that opens a run: --run, --best and, where it writes a folder, --out."""
  found = argparse.ArgumentParser(name, description=doc.splitlines()[0])
  found.add_argument('--run', type=pathlib.Path, required=True, help='folder of a complete run')
  if out:
    found.add_argument(
      '--out', type=pathlib.Path, required=True, help='folder to write, new or empty'
    )
  found.add_argument(
    '--best', action='store_true', help='theta of the best evaluation, not of the end'
  )
  return found


def check_new(folder: pathlib.Path) -> None:
  """Raises ValueError where a command would write into a folder that holds something."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f'--out {folder} is there already; give a new or empty folder')
