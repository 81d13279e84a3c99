"""JSON from anywhere: read within bounds of size and depth, and compared with what it should be.

What a document should be is written as values of Python are:

    str, bool, int, float     a text, true or false, an integer of 64 bits, a finite number
    None, object              null, anything
    [schema]                  a list, each item as the schema says
    {str: schema}             an object, each of its values as the schema says
    {'a': schema, 'b?': ...}  an object that has 'a' and may have 'b'; others are not looked at
    (schema, schema)          one or the other
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from . import textfiles

DEEPEST = 100  # levels of lists and objects, far below where Python's own recursion ends
LARGEST = 2**28  # bytes of a file
MEMORY = 1.5e9  # bytes that the values of a document may take

# Bytes that values take, at most, by the character that begins or separates them.
_COSTS = {'{': 200, '[': 64, ',': 72, ':': 56}
_DEEP = f'{{}} is no JSON that is read: it has more than {DEEPEST} levels'
_HALF = re.compile(r'\\u[dD][89a-fA-F]')  # of a surrogate pair
_KINDS = {
  str: 'a text',
  bool: 'true or false',
  int: 'an integer of 64 bits',
  float: 'a finite number',
  None: 'null',
  list: 'a list',
  dict: 'an object',
}


def read(file: Path, schema: Any = dict) -> Any:
  """The value of a JSON file.

  Args:
    file: UTF-8, or UTF-16 with a byte-order mark.
    schema: what it should be, see the top of this file; `dict` for any object.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no regular file, no text, no JSON, too large or too deep, or something else
      than the schema says; one sentence with file and place.
  """
  value = parsed(textfiles.text_of(file, LARGEST), str(file))
  check(value, schema, str(file))
  return value


def parsed(text: str | bytes, where: str) -> Any:
  """The value of a JSON text.

  Args:
    text: any; bytes are UTF-8.
    where: what has it, for messages.

  Raises:
    ValueError: it is no JSON, has half a character, or is too large or too deep.
  """
  try:
    if isinstance(text, bytes):
      text = text.decode('utf-8-sig')
    _check_bounds(text, where)
    value = json.loads(text)
    _check_depth(value, where)
  except _Refused:
    raise
  except RecursionError as error:
    raise ValueError(_DEEP.format(where)) from error
  except ValueError as error:  # of integers with many digits, too
    raise ValueError(f'{where} is no JSON ({error})') from error
  if _HALF.search(text):
    textfiles.check_whole(json.dumps(value, ensure_ascii=False), where)
  return value


def check(value: Any, schema: Any, where: str, place: str = '') -> None:
  """Raises a ValueError with the place, as `added_tokens[3].id`, if a value is not as said.

  Args:
    value: of a JSON document.
    schema: see the top of this file.
    where: what has the document.
    place: of the value in it.
  """
  if schema is object:
    return
  if isinstance(schema, tuple):
    _check_choice(value, schema, where, place)
    return
  if not _is(value, schema):
    raise _unlike(value, (schema,), where, place)
  if isinstance(schema, list):
    for number, item in enumerate(value):
      if not _passes(item, schema[0]):
        check(item, schema[0], where, f'{place}[{number}]')
  elif isinstance(schema, dict):
    _check_object(value, schema, where, place)


def _check_choice(value: Any, schemas: tuple, where: str, place: str) -> None:
  for schema in schemas:
    if schema is object or _is(value, schema):
      check(value, schema, where, place)
      return
  raise _unlike(value, schemas, where, place)


def _check_object(value: dict, schema: dict, where: str, place: str) -> None:
  for name, inner in schema.items():
    if name is str:
      for key, item in value.items():
        if not _passes(item, inner):
          check(item, inner, where, _below(place, key))
      continue
    key = name.removesuffix('?')
    if key in value:
      check(value[key], inner, where, _below(place, key))
    elif key == name:
      raise ValueError(f'{where}: {place or "its object"} has no {key!r}')


def _passes(value: Any, schema: Any) -> bool:
  """Whether a value is of a plain kind; asked first, since vocabularies are long."""
  return isinstance(schema, type) and (schema is object or _is(value, schema))


def _below(place: str, key: str) -> str:
  """The place of an entry of an object."""
  if not re.fullmatch(r'\w{1,60}', key):
    return f'{place}[{key[:60]!r}]'
  return f'{place}.{key}' if place else key


def _is(value: Any, schema: Any) -> bool:
  """Whether a value is of the kind of a schema; what is in it is not looked at."""
  kind = schema if schema is None or isinstance(schema, type) else type(schema)
  if kind is None:
    return value is None
  if kind is int:
    return type(value) is int and -(2**63) <= value < 2**63
  if kind is float:
    return _is(value, int) or type(value) is float and math.isfinite(value)
  return isinstance(value, kind)


def _unlike(value: Any, schemas: tuple, where: str, place: str) -> ValueError:
  """What is said of a value of another kind."""
  names = []
  for schema in schemas:
    kind = schema if schema is None or isinstance(schema, type) else type(schema)
    names.append(_KINDS[kind])
  at = f'{where}: {place}' if place else where
  return ValueError(f'{at} must be {" or ".join(dict.fromkeys(names))}, not {shown(value)}')


def shown(value: Any) -> str:
  """A value of a JSON document in a few words, for messages."""
  if isinstance(value, dict):
    return f'an object of {len(value):,}'
  if isinstance(value, list):
    return f'a list of {len(value):,}'
  text = json.dumps(value[:60] if isinstance(value, str) else value)
  return text if len(text) <= 60 else f'{text[:60]}...'


class _Refused(ValueError):
  """A ValueError that is a sentence with its place already."""


def _check_bounds(text: str, where: str) -> None:
  """Raises a ValueError if the values of a text would take too much memory."""
  counts = {mark: text.count(mark) for mark in _COSTS}
  memory = 4 * len(text) + sum(_COSTS[mark] * count for mark, count in counts.items())
  if memory > MEMORY:
    raise _Refused(
      f'{where} is too large to be read as JSON: its {len(text):,} characters may take '
      f'{memory / 1e9:.1f} GB of memory'
    )


def _check_depth(value: Any, where: str) -> None:
  """Raises a ValueError if a value has too many levels for what walks through it later."""
  level = [value]
  for _ in range(DEEPEST):
    inside: list[Any] = []
    for item in level:
      if type(item) is dict:
        inside += item.values()
      elif type(item) is list:
        inside += item
    level = [item for item in inside if type(item) in (dict, list)]
    if not level:
      return
  raise _Refused(_DEEP.format(where))
