"""Configuration files and command lines, read and written."""

import ast
import dataclasses
import importlib.resources
import importlib.util
import inspect
import json
import pathlib
import re
import sys
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jpeft import jsonfiles

from .schema import FIELDS, TEXT, Field, check_key, complete, flatten, nearest, nest

_FILE = re.compile(r'(.+?\.py)(?::(.*))?')  # FILE.py or FILE.py:ARG
_NAME = re.compile(r'([\w-]+)(?::(.*))?')  # the same of a config that comes with jpeft
_LITERALS = {'true': True, 'false': False, 'none': None}


def load(reference: str, overrides: dict[str, str] | None = None) -> ConfigDict:
  """The configuration of FILE.py or FILE.py:ARG, or of NAME or NAME:ARG that comes with jpeft.

  Args:
    reference: path of the file or name, and the argument of its `get_config` if any.
    overrides: {dotted key: text}, as given on the command line.

  Raises:
    ValueError, FileNotFoundError: with one sentence that says what to change.
  """
  get_config, path, arg = _get_config(reference)
  if arg and not inspect.signature(get_config).parameters:
    raise ValueError(f'{path} takes no argument, but {arg!r} was given after the colon')
  try:
    if arg:
      values = get_config(arg)
    else:
      values = get_config()
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(f'get_config of {path} raised {type(error).__name__}: {error}') from error
  flat = flatten(values)
  return _with(flat, overrides or {})


def overridden(
  config: ConfigDict, overrides: Mapping[str, str], allowed: Collection[str]
) -> ConfigDict:
  """A configuration with other values of some of its keys.

  Args:
    config: complete.
    overrides: {dotted key: text}, as given on the command line.
    allowed: the keys that may be given.

  Raises:
    ValueError: with one sentence that says what to change.
  """
  return _with(flatten(config), overrides, allowed)


def _with(
  flat: dict[str, Any], overrides: Mapping[str, str], allowed: Collection[str] | None = None
) -> ConfigDict:
  """The complete configuration of values, some of which are overridden; None allows all."""
  for key, text in overrides.items():
    check_key(key, flat)
    if allowed is not None and key not in allowed:
      raise ValueError(
        f'config.{key} is part of what was trained and stays as it is; there may be given '
        f'{", ".join(allowed)}'
      )
    flat[key] = _literal(text, FIELDS.get(key))
  return complete(nest(flat))


def packaged() -> dict[str, pathlib.Path]:
  """{name: file} of the configs that come with jpeft."""
  folder = importlib.resources.files('jpeft') / '_configs'
  return {file.stem: file for file in sorted(pathlib.Path(str(folder)).glob('*.py'))}


def _get_config(reference: str) -> tuple[Callable, pathlib.Path, str | None]:
  """(get_config, path, argument) of what `load` takes; raises as it does."""
  file, arg = _parts(reference)
  path = pathlib.Path(file)
  if not path.suffix:
    path = _packaged(file)
  if not path.is_file():
    files = sorted(path.parent.glob('*.py'))
    there = [str(file) for file in files if file.stem != '__init__']
    raise FileNotFoundError(f'there is no config file {path}{nearest(str(path), there)}')
  get_config = _module(path).__dict__.get('get_config')
  if not callable(get_config):
    raise ValueError(f'{path} has no function get_config')
  return get_config, path, arg


def _parts(reference: str) -> tuple[str, str | None]:
  """(file or name, argument) of a reference.

  Raises:
    ValueError: it is neither.
  """
  match = _FILE.fullmatch(reference) or _NAME.fullmatch(reference)
  if not match:
    raise ValueError(
      f'--config={reference} is not a python file: give FILE.py or FILE.py:ARG, or the name of '
      f'one that comes with jpeft: {", ".join(packaged())}'
    )
  return match[1], match[2]


def _packaged(name: str) -> pathlib.Path:
  """The file of a config that comes with jpeft.

  Raises:
    FileNotFoundError: there is none of this name.
  """
  files = packaged()
  if name in files:
    return files[name]
  near = nearest(name, files)
  own = f'{name}.py'
  if pathlib.Path(own).is_file():
    near = nearest(name, [own])
  raise FileNotFoundError(
    f'no config that comes with jpeft is called {name!r}{near}; there are '
    f'{", ".join(files)}; a file of your own ends in .py'
  )


def _module(path: pathlib.Path):
  """The module of a config file; it may register methods, data sets, metrics and formats."""
  # A name for each file: by it a run folder finds the file that registered something.
  number = zlib.crc32(str(path.resolve()).encode())
  spec = importlib.util.spec_from_file_location(f'jpeft_config_{path.stem}_{number}', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    del sys.modules[spec.name]
    raise ValueError(f'{path} cannot be read as python: {type(error).__name__}: {error}') from error
  return module


def as_text(value) -> str:
  """A value as the command line takes it."""
  if isinstance(value, str):
    return value
  if value is None or isinstance(value, bool):
    return str(value).lower()
  return repr(value)


def _literal(text: str, field: Field | None):
  """The value of a command-line text: a python literal, true/false/none, or the text itself."""
  if field and field.types == TEXT:
    return text
  if text.lower() in _LITERALS:
    return _LITERALS[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


@dataclasses.dataclass(frozen=True)
class Command:
  """A parsed command line: the config, what overrides it, and where the run is kept."""

  reference: str
  overrides: dict[str, str]
  workdir: pathlib.Path | None

  def load(self) -> ConfigDict:
    return load(self.reference, self.overrides)

  def baseline(self, arg: str) -> 'Command':
    """The same file with another argument, without overrides of the method and its optimizer."""
    overrides = {}
    for key, text in self.overrides.items():
      if key.split('.')[0] not in ('method', 'optimizer'):
        overrides[key] = text
    file, _ = _parts(self.reference)
    return Command(f'{file}:{arg}', overrides, self.workdir)

  @property
  def takes_argument(self) -> bool:
    """Whether the file's `get_config` takes what stands after the colon."""
    get_config, _, _ = _get_config(self.reference)
    return bool(inspect.signature(get_config).parameters)

  def folder(self) -> pathlib.Path:
    """--workdir, or runs/FILE-ARG."""
    if self.workdir:
      return self.workdir
    file, arg = _parts(self.reference)
    name = pathlib.Path(file).stem
    if arg is not None:
      name += f'-{arg.replace(":", "-")}'
    return pathlib.Path('runs') / name


def parse(argv: list[str]) -> Command:
  """Reads --config=FILE[:ARG] --config.key=value ... --workdir=DIR; `--flag value` works as well.

  Raises:
    ValueError: an unknown flag, a flag without a value, or no --config.
  """
  overrides, rest = overrides_of(argv)
  flags = {}
  while rest:
    flag = rest[0].partition('=')[0]
    if flag not in ('--config', '--workdir'):
      raise ValueError(
        f'unknown argument {flag!r}{nearest(flag, ["--config", "--workdir"])}; '
        'config values are set by --config.key=value'
      )
    flags[flag] = _value_of(rest)
  if '--config' not in flags:
    raise ValueError('--config=FILE.py is missing, or a name such as --config=quickstart')
  workdir = None
  if flags.get('--workdir'):
    workdir = pathlib.Path(flags['--workdir'])
  return Command(flags['--config'], overrides, workdir)


def overrides_of(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """({dotted key: text} of all --config.key=value, the other arguments).

  Raises:
    ValueError: a key without a value.
  """
  overrides = {}
  others = []
  rest = list(argv)
  while rest:
    if rest[0].startswith('--config.'):
      key = rest[0].partition('=')[0].removeprefix('--config.')
      overrides[key] = _value_of(rest)
    else:
      others.append(rest.pop(0))
  return overrides, others


def _value_of(rest: list[str]) -> str:
  """The value of the first argument, which may be the second; both are taken off the list."""
  flag, equals, value = rest.pop(0).partition('=')
  if equals:
    return value
  if not rest or rest[0].startswith('--'):
    raise ValueError(f'{flag} needs a value: {flag}=VALUE')
  return rest.pop(0)


def to_json(config: ConfigDict) -> str:
  """A configuration as the text of config.json in a run folder."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(path: pathlib.Path) -> ConfigDict:
  """The configuration of a run folder.

  Raises:
    ValueError: not a configuration of this version.
  """
  try:
    return complete(jsonfiles.read(path))
  except ValueError as error:
    if str(path) in str(error):
      raise
    raise ValueError(f'{path}: {error}') from error


def changes(ours: ConfigDict, theirs: ConfigDict) -> dict[str, tuple]:
  """{dotted key: (OURS, THEIRS)} of the values in which two configurations differ."""
  here = flatten(json.loads(to_json(ours)))
  there = flatten(json.loads(to_json(theirs)))
  found = {}
  for key in sorted({*here, *there}):
    if here.get(key) != there.get(key):
      found[key] = here.get(key), there.get(key)
  return found


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
  """The dotted keys in which two configurations differ: 'key (OURS here, THEIRS there)'."""
  found = changes(ours, theirs)
  return [f'{key} ({here!r} here, {there!r} there)' for key, (here, there) in found.items()]
