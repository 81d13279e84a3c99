"""Which column of a table of typed columns is which part of an example.

Options name columns, as `text=sentence`; what is left out is found by type and name:

    text, pair, label     texts with labels; the text is the column 'text', or the only one of texts
    image, label          images with labels; the image is the only column of images
    messages, tools       chats
    prompt, completion    prompts with completions

The label is the only column of classes, else the column 'label' or 'labels'. Where columns of
several kinds would do, images are taken before texts, and other choices are to be made by name.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..source import suggestion
from .unlabelled import OPTION

# The parts of each kind of example.
GROUPS = {
  'images': ('image', 'label'),
  'texts': ('text', 'pair', 'label'),
  'chats': ('messages', 'tools'),
  'completions': ('prompt', 'completion'),
}
PARTS = tuple(dict.fromkeys(part for parts in GROUPS.values() for part in parts))
OPTIONS = (*PARTS, OPTION)
NEEDED = {
  'images': ('image', 'label'),
  'texts': ('text', 'label'),
  'chats': ('messages',),
  'completions': ('prompt', 'completion'),
}
# Kinds of columns that a part can be.
FITS = {
  'image': ('image', 'bytes'),
  'text': ('text',),
  'pair': ('text',),
  'label': ('class', 'integer', 'number', 'text'),
  'messages': ('messages',),
  'tools': ('text', 'list'),
  'prompt': ('text',),
  'completion': ('text',),
}


class Column(NamedTuple):
  """What a column has.

  Attributes:
    kind: 'text', 'integer', 'number', 'class', 'image', 'bytes', 'messages', 'list' or 'other'.
    classes: the names of a 'class'.
    type: as the library calls it, for messages.
  """

  kind: str
  classes: tuple[str, ...]
  type: str


def columns_of(schema) -> dict[str, Column]:
  """{name: what it has} of a schema of pyarrow, by its types and by what `datasets` noted in it."""
  noted = {}
  text = (schema.metadata or {}).get(b'huggingface')
  if text:
    noted = json.loads(text).get('info', {}).get('features') or {}
  found = {}
  for field in schema:
    if not field.name.startswith('__index_level_'):  # that of pandas, which is no data
      found[field.name] = _column(field.type, noted.get(field.name))
  return found


def _column(arrow, noted: Any) -> Column:
  import pyarrow.types as types

  if not isinstance(noted, dict):
    noted = {}
  if noted.get('_type') == 'ClassLabel' and noted.get('names'):
    return Column('class', tuple(noted['names']), 'ClassLabel')
  if noted.get('_type') == 'Image':
    return Column('image', (), 'Image')
  if types.is_dictionary(arrow):
    arrow = arrow.value_type
  kind = 'other'
  if types.is_string(arrow) or types.is_large_string(arrow):
    kind = 'text'
  elif types.is_integer(arrow) or types.is_boolean(arrow):
    kind = 'integer'
  elif types.is_floating(arrow):
    kind = 'number'
  elif types.is_binary(arrow) or types.is_large_binary(arrow):
    kind = 'bytes'
  elif types.is_struct(arrow) and arrow.get_field_index('bytes') >= 0:
    kind = 'image'
  elif types.is_list(arrow) or types.is_large_list(arrow):
    item = arrow.value_type
    is_message = types.is_struct(item) and item.get_field_index('role') >= 0
    kind = 'messages' if is_message else 'list'
  return Column(kind, (), str(arrow))


def parts_of(
  source: str, columns: Mapping[str, Column], options: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
  """(kind of the examples, a key of GROUPS; {part: its column}).

  Args:
    source: of the columns, as it was named, for messages.
    columns: of the table.
    options: {part: the column that was named}.

  Raises:
    ValueError: no such column, one of another type, or several that may be meant.
  """
  for part, name in options.items():
    if name not in columns:
      raise ValueError(f'{source} has no column {name!r}; {suggestion(name, columns)}')
    if columns[name].kind not in FITS[part]:
      raise ValueError(
        f'{source}: {name!r} is a column of {columns[name].type}, and cannot be the {part}'
      )
  named = [kind for kind, parts in GROUPS.items() if set(options) <= set(parts)]
  if not named:
    raise ValueError(
      f'{source}: the options {", ".join(options)} are not of one kind of examples; there are '
      f'{"; ".join(", ".join(parts) for parts in GROUPS.values())}'
    )
  found = {}
  for kind in named:
    parts = _completed(kind, columns, options)
    if set(NEEDED[kind]) <= set(parts):
      found[kind] = parts
  if 'images' in found:
    found.pop('texts', None)
  if len(found) == 1:
    return next(iter(found.items()))
  listed = ', '.join(f'{name!r} ({column.type})' for name, column in columns.items())
  if found:
    said = f'its columns may be read as {" or as ".join(found)}'
    option = NEEDED[next(iter(found))][0]
  else:
    kind = min(named, key=lambda kind: _distance(kind, columns, options))
    option, *_ = _lacking(kind, columns, options)
    said = f'which column is the {option} of {kind}?'
  base = source.partition('?')[0]
  raise ValueError(f'{source}: {said} Say it, as in {base}?{option}=COLUMN; there is {listed}')


def _lacking(kind: str, columns: Mapping[str, Column], options: Mapping[str, str]) -> list[str]:
  """The parts of a kind of examples that no column is found for."""
  found = _completed(kind, columns, options)
  return [part for part in NEEDED[kind] if part not in found]


def _distance(
  kind: str, columns: Mapping[str, Column], options: Mapping[str, str]
) -> tuple[int, int]:
  """(parts that no column can be, parts that no column is found for) of a kind of examples."""
  lacking = _lacking(kind, columns, options)
  kinds = {column.kind for column in columns.values()}
  impossible = [part for part in lacking if not kinds & set(FITS[part])]
  return len(impossible), len(lacking)


def _completed(
  kind: str, columns: Mapping[str, Column], options: Mapping[str, str]
) -> dict[str, str]:
  """{part: its column}, those that are named and those that can be only one."""
  parts = dict(options)
  if kind in ('chats', 'completions'):
    for part in GROUPS[kind]:
      if part in columns and columns[part].kind in FITS[part]:
        parts.setdefault(part, part)
    return parts
  if 'label' not in parts:
    fit = [name for name, column in columns.items() if column.kind == 'class']
    if len(fit) != 1:
      fit = [name for name in ('label', 'labels') if name in columns]
      fit = [name for name in fit if columns[name].kind in FITS['label']]
    if len(fit) == 1:
      parts['label'] = fit[0]
  wanted = 'image' if kind == 'images' else 'text'
  if wanted not in parts:
    free = [name for name in columns if name not in parts.values()]
    fit = [name for name in free if columns[name].kind == wanted]
    if wanted in fit:
      fit = [wanted]
    if len(fit) == 1:
      parts[wanted] = fit[0]
  return parts
