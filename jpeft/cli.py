"""Command lines: mistakes in one sentence, exit codes, the flags that commands share.

Every command takes `--import MODULE` (repeatable; a name, or the path of a .py file), which imports
a module before anything else, and `--traceback`, which shows where a mistake arose.
"""

import argparse
import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from jpeft import textfiles, writing

Item = TypeVar('Item')

SHARED = (
  '--import MODULE imports a module or a .py file first, such as one that registers a method '
  '(repeatable); --traceback shows where a mistake arose'
)


class Mistake(Exception):
  """What the user can put right: shown in one sentence, exit code 2."""

  code = 2


class Stopped(Exception):
  """A signal ended a command: exit code 128 + its number, as a shell counts.

  Args:
    number: of the signal.
    where: how to go on, for the sentence; '' for nothing.
  """

  def __init__(self, number: int, where: str = ''):
    sentence = f'stopped by {signal.Signals(number).name}'
    if where:
      sentence += f'; {where}'
    super().__init__(sentence)
    self.code = 128 + number


class Diverged(Exception):
  """A loss or gradient is not finite: exit code 1."""

  code = 1


@contextlib.contextmanager
def inputs_checked():
  """Turns errors about files, values and missing packages into a Mistake."""
  try:
    yield
  except (ValueError, OSError, RuntimeError, ImportError) as error:
    raise Mistake(' '.join(str(error).split())) from error


def checked(items: Iterator[Item]) -> Iterator[Item]:
  """The items of an iterator, such as batches; an error in reading one becomes a Mistake."""
  while True:
    with inputs_checked():
      try:
        item = next(items)
      except StopIteration:
        return
    yield item


def command(
  name: str, main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None
) -> int:
  """Runs a command line and returns its exit code; what ends it is one sentence on stderr.

  That is a mistake, Ctrl-C, or a disk that takes no more. Where the reader of its output has gone,
  as `head` does, it ends without a word, as from SIGPIPE.

  Args:
    name: of the command, in front of the sentence.
    main: gets the arguments that are left after the shared flags; None is exit code 0.
    argv: the arguments; those of the process if left out.
  """
  if argv is None:
    argv = sys.argv[1:]
  traceback = '--traceback' in argv
  try:
    if signal.getsignal(signal.SIGINT) is _stop_now:
      signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is work to end
    rest, modules = _without_imports([word for word in argv if word != '--traceback'])
    for module in modules:
      import_module(module)
    code = main(rest) or 0
    sys.stdout.flush()  # else a full disk is met at the exit, behind all that could tell of it
    return code
  except BaseException as error:
    ending = _ending(error)
    if ending is None or traceback:
      raise
    at_once = any(isinstance(one, KeyboardInterrupt) for one in (error, error.__cause__))
  _tell(name, ending)
  if at_once and _started_as() is not None:
    # Threads are still at work, and the interpreter may crash on the way out.
    _leave(ending.code)
  return ending.code


def _ending(error: BaseException) -> Mistake | Stopped | Diverged | None:
  """What is told of an error that ends a command; None of one that is a fault of jpeft."""
  if isinstance(error, (Mistake, Stopped, Diverged)):
    return error
  if isinstance(error, KeyboardInterrupt):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends what is still at work
    return Stopped(signal.SIGINT)
  if isinstance(error, BrokenPipeError) and _output_is_gone():
    _leave_output()
    return Stopped(signal.SIGPIPE)
  reason = writing.reason_of(error)
  if reason is None:
    return None
  if isinstance(error, writing.NotWritten):
    return Mistake(str(error))
  if isinstance(error, OSError) and error.filename is not None:
    return Mistake(f'{error.filename} cannot be written: {reason}')
  _leave_output()
  return Mistake(f'the output, or a file, cannot be written: {reason}')


def _output_is_gone() -> bool:
  """Whether stdout is a pipe that nobody reads."""
  with contextlib.suppress(OSError, ValueError):
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))
  return False


def _leave_output() -> None:
  """Sends to nowhere what is still to be printed: the interpreter would try it at its end."""
  with contextlib.suppress(OSError, ValueError):  # an output without a file has no such end
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _leave(code: int) -> None:
  """Ends the process without waiting for its threads."""
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)


def _tell(name: str, ending: Mistake | Stopped | Diverged) -> None:
  """Prints the sentence of what has ended a command."""
  if ending.code == 128 + signal.SIGPIPE:
    return
  kind = '' if isinstance(ending, Stopped) else 'error: '
  with contextlib.suppress(OSError):  # the terminal may have gone
    print(f'{name}: {kind}{ending}', file=sys.stderr)


def _started_as() -> str | None:
  """The name of the command that this process was started as; None if as another program."""
  words = iter(sys.orig_argv[1:])
  for word in words:
    if word in ('-W', '-X'):  # of the interpreter, with a value
      next(words, '')
    elif word == '-m':
      name = next(words, '')
      return name if name.partition('.')[0] == 'jpeft' else None
    elif not word.startswith('-'):
      name = os.path.basename(word)
      return name if name == 'jpeft' else None
  return None


def _stop_now(number: int, frame) -> None:
  """The handler of Ctrl-C while a command imports its modules.

  An exception would not do: extension modules swallow it, or abort.
  """
  os.write(2, f'{_started_as()}: {Stopped(number)}\n'.encode())
  os._exit(128 + number)


if _started_as() is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, _stop_now)


def _without_imports(argv: list[str]) -> tuple[list[str], list[str]]:
  """(the other arguments, the values of --import)."""
  rest = []
  modules = []
  words = iter(argv)
  for word in words:
    flag, equals, value = word.partition('=')
    if flag != '--import':
      rest.append(word)
      continue
    if not equals:
      value = next(words, '')
    if not value or value.startswith('--'):
      raise Mistake('--import needs a value: --import MODULE')
    modules.append(value)
  return rest, modules


# ---- Modules from outside.


def import_module(reference: str) -> None:
  """Imports a module once.

  Args:
    reference: its name, or the path of its file: what ends in .py is a path.

  Raises:
    Mistake: there is no such module, or it raises.
  """
  if is_imported(reference):
    return
  try:
    if reference.endswith('.py'):
      _import_file(pathlib.Path(reference))
    else:
      # The console script starts with its own folder on the path, and not with the current one.
      if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
      importlib.import_module(reference)
  except Exception as error:
    raise Mistake(f'--import {reference}: {type(error).__name__}: {error}') from error


def _import_file(path: pathlib.Path) -> None:
  spec = importlib.util.spec_from_file_location(f'jpeft_import_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[spec.name]
    raise


def is_imported(reference: str) -> bool:
  """Whether a module has been imported, by its name or by the path of its file."""
  if not reference.endswith('.py'):
    return reference in sys.modules
  wanted = os.path.realpath(reference)
  files = [_file_of(name) for name in list(sys.modules)]
  return any(file is not None and os.path.realpath(file) == wanted for file in files)


def _file_of(module: str) -> str | None:
  # Not by getattr, which makes lazy modules import more.
  return getattr(sys.modules.get(module), '__dict__', {}).get('__file__')


def reference_of(module: str) -> str:
  """What `import_module` takes for an imported module: its name, or the path of its file.

  A config file and a script (`__main__`) cannot be imported by name.
  """
  if importlib.machinery.PathFinder.find_spec(module.partition('.')[0]) is not None:
    return module
  file = _file_of(module)
  if file is None:
    return module
  return os.path.realpath(file)


# ---- Arguments.


def asks_help(argv: Sequence[str]) -> bool:
  """Whether a command line asks for help."""
  return '--help' in argv or '-h' in argv


def width() -> int:
  """The characters of a line of help: those of the terminal less two, as argparse counts."""
  return shutil.get_terminal_size().columns - 2


def described(doc: str) -> str:
  """A docstring for the terminal: paragraphs are wrapped anew, indented lines stay as they are."""
  parts = doc.strip().split('\n\n')
  return '\n\n'.join(part if part.startswith(' ') else _wrapped(part) for part in parts)


def _wrapped(paragraph: str) -> str:
  return textwrap.fill(paragraph, width(), break_on_hyphens=False, break_long_words=False)


def parser(name: str, doc: str) -> argparse.ArgumentParser:
  """A parser that describes a command by the first line of its docstring."""
  return argparse.ArgumentParser(name, description=doc.splitlines()[0], epilog=SHARED)


def run_parser(name: str, doc: str, out: bool = False) -> argparse.ArgumentParser:
  """The parser of a command that opens a run: --run, --best and, if it writes a folder, --out."""
  found = parser(name, doc)
  found.add_argument('--run', type=pathlib.Path, required=True, help='folder of a complete run')
  if out:
    found.add_argument(
      '--out', type=pathlib.Path, required=True, help='folder to write, new or empty'
    )
  add_best(found)
  return found


def add_best(found: argparse.ArgumentParser) -> None:
  """Adds --best."""
  found.add_argument(
    '--best', action='store_true', help='theta of the best evaluation, not of the end'
  )


def check_new(folder: pathlib.Path) -> None:
  """Raises a ValueError unless `folder` is missing, or empty but for what a kill has left."""
  if not folder.exists():
    return
  if not folder.is_dir() or any(path.name != writing.PART for path in folder.iterdir()):
    raise ValueError(f'--out {folder} is there already; give a new or empty folder')


def check_input(name: str) -> None:
  """Raises a FileNotFoundError unless `name` is a file, or '-' for stdin."""
  if name != '-' and not pathlib.Path(name).is_file():
    raise FileNotFoundError(f'there is no file {name}')


def lines(name: str) -> list[str]:
  """The lines of a text file that are not empty, as those of `numbered_lines`."""
  return [line for _, line in numbered_lines(name)]


def numbered_lines(name: str) -> list[tuple[int, str]]:
  """(number, line without its end) of the lines of a text file that are not empty; '-' is stdin.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: bytes or characters that are no text.
  """
  check_input(name)
  if name == '-':
    found = list(sys.stdin)
  else:
    with textfiles.opened(pathlib.Path(name)) as file:
      found = list(file)
  for number, line in enumerate(found, 1):
    textfiles.check_whole(line, f'line {number} of {name}')
  return [(number, line.rstrip('\n')) for number, line in enumerate(found, 1) if line.strip()]
