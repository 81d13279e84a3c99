"""A process that reads damaged files: `python -m tests.fuzz.run MODULE NAME FIRST LAST [NAME ...]`.

MODULE has READERS. A line is written for each case before it is read, 'NAME NUMBER', so that
whoever started the process knows which one hangs or ends it, and 'NAME NUMBER: what went wrong'
behind those that fail. Memory is bounded by the operating system: what needs more than LIMIT beyond
the start is a MemoryError.
"""

import importlib
import pathlib
import random
import resource
import sys
import tempfile
import traceback
import warnings

LIMIT = 2 * 10**9
_BARE = ('UnicodeDecodeError', 'UnicodeEncodeError', 'JSONDecodeError')


def main(argv: list[str]) -> None:
  warnings.simplefilter('ignore')  # what Pillow and others say of odd files
  module, *jobs = argv
  readers = importlib.import_module(module).READERS
  with tempfile.TemporaryDirectory() as folder:
    for at in range(0, len(jobs), 3):
      name, first, last = jobs[at : at + 3]
      _run(readers[name], range(int(first), int(last)), pathlib.Path(folder))
  _tell('done')


def _run(reader, numbers: range, folder: pathlib.Path) -> None:
  _tell(f'{reader.name} -1')
  _read(reader, folder, reader.files())  # whole files, and what is imported on the way
  resource.setrlimit(resource.RLIMIT_AS, (_size() + LIMIT, resource.RLIM_INFINITY))
  for number in numbers:
    _tell(f'{reader.name} {number}')
    try:
      _read(reader, folder, reader.damaged(random.Random(f'{reader.name} {number}')))
    except BaseException as error:
      wrong = _wrong(reader, error)
      if wrong:
        _tell(f'{reader.name} {number}: {wrong}')
  resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _tell(line: str) -> None:
  print(line, flush=True)


def _read(reader, folder: pathlib.Path, files) -> None:
  with tempfile.TemporaryDirectory(dir=folder) as inner:
    place = pathlib.Path(inner)
    for name, data in files.items():
      (place / name).parent.mkdir(parents=True, exist_ok=True)
      (place / name).write_bytes(data)
    reader.read(place)


def _wrong(reader, error: BaseException) -> str | None:
  """What is wrong with an error; None if it is one that readers may raise."""
  told = str(error)
  kind = type(error).__name__
  if isinstance(error, (ValueError, FileNotFoundError)) and kind not in _BARE:
    if reader.says in told:
      return None
    return f'a message without {reader.says!r}: {told[:200]!r}'
  frames = traceback.extract_tb(error.__traceback__)
  inside = [frame for frame in frames if '/jpeft/' in frame.filename] or frames
  return f'{kind}({told[:150]!r}) in {pathlib.Path(inside[-1].filename).name}:{inside[-1].lineno}'


def _size() -> int:
  """Bytes of address space of this process."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  return pages * resource.getpagesize()


if __name__ == '__main__':
  main(sys.argv[1:])
