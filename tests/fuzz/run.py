"""A process that reads damaged files: `python -m tests.fuzz.run NAME FIRST LAST [NAME ...]`.

It writes a line for each case before it is read, 'NAME NUMBER', so that whoever started it knows
which one hangs or ends it, and 'NAME NUMBER: what went wrong' behind those that fail. Memory is
bounded by the operating system: what needs more than LIMIT beyond the start is a MemoryError.
"""

import pathlib
import random
import resource
import sys
import tempfile
import traceback
import warnings

LIMIT = 2 * 10**9


def main(argv: list[str]) -> None:
  warnings.simplefilter('ignore')  # what Pillow and others say of odd files
  from tests.fuzz.readers import READERS

  out = sys.stdout
  with tempfile.TemporaryDirectory() as folder:
    for at in range(0, len(argv), 3):
      name, first, last = argv[at], int(argv[at + 1]), int(argv[at + 2])
      reader = READERS[name]
      print(name, -1, file=out, flush=True)
      _try(reader, pathlib.Path(folder), None)  # whole files; imports on the way
      resource.setrlimit(resource.RLIMIT_AS, (_size() + LIMIT, resource.RLIM_INFINITY))
      for number in range(first, last):
        print(name, number, file=out, flush=True)
        wrong = _try(reader, pathlib.Path(folder), number)
        if wrong:
          print(f'{name} {number}: {wrong}', file=out, flush=True)
      resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print('done', file=out, flush=True)


def _try(reader, folder: pathlib.Path, number: int | None) -> str | None:
  """What goes wrong with a case; the undamaged files, of which nothing may, for None."""
  files = dict(reader.files())
  if number is not None:
    files = reader.damaged(files, random.Random(f'{reader.name} {number}'))
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  try:
    reader.read(folder)
  except BaseException as error:
    if number is None:
      raise
    return _judged(reader, error)
  finally:
    for name in files:
      (folder / name).unlink()
  return None


def _judged(reader, error: BaseException) -> str | None:
  """What is wrong with an error; None if it is one that readers may raise."""
  told = str(error)
  if isinstance(error, (ValueError, FileNotFoundError)) and type(error).__name__ not in (
    *('UnicodeDecodeError', 'UnicodeEncodeError', 'JSONDecodeError'),
  ):
    if reader.says in told:
      return None
    return f'a message without {reader.says!r}: {told[:200]!r}'
  place = traceback.extract_tb(error.__traceback__)
  inside = [frame for frame in place if '/jpeft/' in frame.filename] or place
  last = inside[-1]
  return (
    f'{type(error).__name__}({told[:150]!r}) in {pathlib.Path(last.filename).name}:{last.lineno}'
  )


def _size() -> int:
  """Bytes of address space of this process."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  return pages * resource.getpagesize()


if __name__ == '__main__':
  main(sys.argv[1:])
