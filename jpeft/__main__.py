"""The command `jpeft`: `jpeft train ...` is `python -m jpeft.train ...`, and so on."""

import runpy
import sys

from jpeft.cli import asks_help, width
from jpeft.messages import did_you_mean, entries
from jpeft.version import __version__

# What each command does; its module is imported when it runs.
COMMANDS = {
  'train': 'train a method on a backbone and a data set',
  'plan': 'say what a training step needs of a device that need not be there',
  'evaluate': 'score a run, on its test split or on other examples',
  'predict': 'label images or texts by the model of a run',
  'merge': 'write plain weights of a run',
  'generate': 'write text with a decoder',
  'adapter': "write LoRA or DoRA of a run as Hugging Face's peft does",
  'methods': 'list the methods',
  'config': 'print all values of a configuration, or the names of those that come along',
}
BENCHES = {
  'accuracy': 'methods x tasks x seeds',
  'memory': 'the memory of a training step of every method',
  'speed': 'step times as ratios',
  'kernels': 'what the 4-bit kernels cost beside XLA alone',
  'steps': 'time and peak memory of steps that run, beside those of peft',
  'mesh': 'the plan of a 70B decoder on a slice of TPUs',
}


def usage() -> str:
  """The commands, a line each."""
  rows = [(f'jpeft {name}', text) for name, text in COMMANDS.items()]
  rows += [(f'jpeft bench {name}', text) for name, text in BENCHES.items()]
  return '\n'.join(
    [*entries(rows, width()), '', 'jpeft COMMAND --help lists the flags of a command.']
  )


def module_of(words: list[str]) -> tuple[str, list[str]]:
  """(the module of a command, its own arguments) of a command line.

  Raises:
    ValueError: no such command.
  """
  name, *rest = words
  if name == 'bench':
    if not rest or rest[0] not in BENCHES:
      given = rest[0] if rest else ''
      raise ValueError(
        f'there is no benchmark {given!r}{did_you_mean(given, BENCHES)}; '
        f'there are {", ".join(BENCHES)}'
      )
    return f'jpeft.bench.{rest[0]}', rest[1:]
  if name not in COMMANDS:
    known = [*COMMANDS, 'bench']
    raise ValueError(
      f'there is no command {name!r}{did_you_mean(name, known)}; there are {", ".join(known)}'
    )
  return f'jpeft.{name}', rest


def main() -> int:
  """Runs the command that the command line names."""
  words = sys.argv[1:]
  of_bench = words[:1] == ['bench'] and asks_help(words[1:2])
  if not words or asks_help(words[:1]) or of_bench:
    print(usage())
    return 0
  if words == ['--version']:
    print(f'jpeft {__version__}')
    return 0
  try:
    module, rest = module_of(words)
  except ValueError as error:
    print(f'jpeft: error: {error}', file=sys.stderr)
    return 2
  # As `python -m` runs it, with its exit code.
  sys.argv = [module, *rest]
  runpy.run_module(module, run_name='__main__', alter_sys=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
