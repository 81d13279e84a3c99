"""Which column of a table of typed columns is which part of an example.

Options name columns, as `text=sentence`; what is left out is found by type and name:

    text, pair, label            texts with labels; the text is the column 'text', or the only one
                                 of texts
    image, label                 images with labels; the image is the only column of images
    messages, tools              chats
    prompt, completion           prompts with completions
    tokens, tags                 sentences with tags; the words are the column 'tokens' or 'words',
                                 or the only one of lists of texts
    question, context, answers   questions on texts
    prompt, chosen, rejected     two answers to a prompt, see `preferences`
    text, pair                   texts alone

Which of these are looked for is a matter of the kind of labels that is wanted:

    classes   the label is the only column of classes, else the column 'label' or 'labels'
    numbers   it is the column 'label' or 'labels', else the only one of numbers with a fraction, or
              of classes, whose names are then numbers; or several are named, as in label=a,b
    sets      it is the only column of lists of classes, else the column 'label' or 'labels' if it
              has lists; or a column of 1 and 0 for each class is named, as in label=a,b
    tags      they are the column 'tags', else the only one of lists of classes, else the only one
              whose name ends with '_tags'
    answers   they are the column 'answers', else the only one of such answers

Where columns of several kinds would do, images are taken before texts, and other choices are to be
made by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jpeft import jsonfiles

from ..labels import ANSWERS, CLASSES, NOTHING, NUMBERS, PREFERENCES, SETS, TAGS, TASK_OF
from ..source import suggestion
from .unlabelled import OPTION


class Group(NamedTuple):
  """A kind of examples.

  Attributes:
    parts: that one may have.
    needed: those that it must have.
  """

  parts: tuple[str, ...]
  needed: tuple[str, ...]


_LABELLED = {
  'images': Group(('image', 'label'), ('image', 'label')),
  'texts': Group(('text', 'pair', 'label'), ('text', 'label')),
}
# {kind of labels: the kinds of examples that have them}
GROUPS: dict[str, dict[str, Group]] = {
  CLASSES: _LABELLED
  | {
    'chats': Group(('messages', 'tools'), ('messages',)),
    'completions': Group(('prompt', 'completion'), ('prompt', 'completion')),
  },
  NUMBERS: _LABELLED,
  SETS: _LABELLED,
  TAGS: {'sentences': Group(('tokens', 'tags'), ('tokens', 'tags'))},
  ANSWERS: {
    'questions': Group(('question', 'context', 'answers'), ('question', 'context', 'answers'))
  },
  NOTHING: {'texts': Group(('text', 'pair'), ('text',))},
  PREFERENCES: {
    'preferences': Group(('prompt', 'chosen', 'rejected'), ('chosen', 'rejected')),
  },
}
PARTS = tuple(
  dict.fromkeys(
    part for groups in GROUPS.values() for group in groups.values() for part in group.parts
  )
)
# The parts that a row is to be learned from, and their names in a sentence.
LABELS = ('label', 'tags', 'answers')
NAMES = 'names'  # the option of names of tags that are numbers
OPTIONS = (*PARTS, NAMES, OPTION)
# Kinds of columns that a part can be.
FITS = {
  'image': ('image', 'bytes'),
  'text': ('text',),
  'pair': ('text',),
  'messages': ('messages',),
  'tools': ('text', 'list'),
  'prompt': ('text',),
  'completion': ('text',),
  'chosen': ('text', 'messages'),
  'rejected': ('text', 'messages'),
  'tokens': ('texts',),
  'tags': ('classes', 'integers', 'texts'),
  'question': ('text',),
  'context': ('text',),
  'answers': ('answers',),
}
# Those of labels: {kind of labels: (kinds of columns, what that is)}
_FIT_LABELS = {
  CLASSES: (('class', 'integer', 'boolean', 'number', 'text'), 'a class, an integer or a text'),
  NUMBERS: (('class', 'integer', 'number', 'decimal', 'text'), 'a number'),
  SETS: (
    ('classes', 'integers', 'texts'),
    'a list of classes; or name a column of 1 and 0 for each class, as in label=a,b',
  ),
}
_FIT_MEMBERS = (
  ('class', 'integer', 'boolean', 'number', 'text'),
  '1 or 0 in a column of each class',
)
# What `datasets` notes of a table: {'info': {'features': {column: its feature}}}.
_NOTED = {'info?': ({'features?': (dict, None)}, None)}
# Kinds of lists by that of their items.
_OF_ITEMS = {'text': 'texts', 'integer': 'integers', 'class': 'classes', 'null': 'null'}


class Column(NamedTuple):
  """What a column has.

  Attributes:
    kind: 'text', 'integer', 'boolean', 'number', 'decimal', 'class', 'image' or 'bytes'; 'texts',
      'integers' or 'classes' for lists of these; 'messages', 'answers', 'list' or 'other'; 'null'
      for nothing but nulls or empty lists, which may be a part of any type.
    classes: the names of a 'class' or of 'classes'.
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
    where = "what 'datasets' noted of the columns"
    value = jsonfiles.parsed(text, where)
    jsonfiles.check(value, _NOTED, where)
    noted = (value.get('info') or {}).get('features') or {}
  found = {}
  for field in schema:
    if not field.name.startswith('__index_level_'):  # that of pandas, which is no data
      found[field.name] = _column(field.type, noted.get(field.name))
  return found


def _column(arrow, noted: Any) -> Column:
  import pyarrow.types as types

  noted = _noted(noted)
  if noted.get('_type') == 'ClassLabel' and noted.get('names'):
    jsonfiles.check(noted, {'names': [str]}, "what 'datasets' noted of a column")
    return Column('class', tuple(noted['names']), 'ClassLabel')
  if noted.get('_type') == 'Image':
    return Column('image', (), 'Image')
  if types.is_dictionary(arrow):
    arrow = arrow.value_type
  if types.is_list(arrow) or types.is_large_list(arrow) or types.is_fixed_size_list(arrow):
    return _list(arrow, noted)
  kind = 'other'
  if types.is_null(arrow):
    kind = 'null'
  elif types.is_string(arrow) or types.is_large_string(arrow):
    kind = 'text'
  elif types.is_integer(arrow):
    kind = 'integer'
  elif types.is_boolean(arrow):
    kind = 'boolean'
  elif types.is_floating(arrow):
    kind = 'number'
  elif types.is_decimal(arrow):
    kind = 'decimal'
  elif types.is_binary(arrow) or types.is_large_binary(arrow):
    kind = 'bytes'
  elif _has_fields(arrow, 'bytes'):
    kind = 'image'
  elif _has_fields(arrow, 'text', 'answer_start'):
    kind = 'answers'
  return Column(kind, (), str(arrow))


def _list(arrow, noted: Mapping[str, Any]) -> Column:
  """What a column of lists has."""
  if _has_fields(arrow.value_type, 'role'):
    return Column('messages', (), str(arrow))
  if _has_fields(arrow.value_type, 'text', 'answer_start'):
    return Column('answers', (), str(arrow))
  item = _column(arrow.value_type, noted.get('feature'))
  kind = _OF_ITEMS.get(item.kind, 'list')
  return Column(kind, item.classes, f'list<{item.type}>')


def _noted(feature: Any) -> Mapping[str, Any]:
  """What `datasets` notes of a column, lists in their older form, [feature], too."""
  if isinstance(feature, list) and len(feature) == 1:
    return {'feature': feature[0]}
  return feature if isinstance(feature, dict) else {}


def _has_fields(arrow, *names: str) -> bool:
  import pyarrow.types as types

  return types.is_struct(arrow) and all(arrow.get_field_index(name) >= 0 for name in names)


class Parts(NamedTuple):
  """Which columns are what.

  Attributes:
    examples: their kind, such as 'texts'.
    names: {part of an example: its column}, without the label.
    label: the columns of the label; none where there is none.
  """

  examples: str
  names: dict[str, str]
  label: tuple[str, ...]


def parts_of(
  source: str, columns: Mapping[str, Column], options: Mapping[str, str], labels: str
) -> Parts:
  """Which columns are what.

  Args:
    source: of the columns, as it was named, for messages.
    columns: of the table.
    options: {part: the column that was named}.
    labels: the kind that is wanted, see `..labels`.

  Raises:
    ValueError: no such column, one of another type, or several that may be meant.
  """
  groups = GROUPS[labels]
  named = [kind for kind, group in groups.items() if set(options) <= set(group.parts)]
  if not named:
    known = '; '.join(', '.join(group.parts) for group in groups.values())
    raise ValueError(
      f'{source}: the options {", ".join(options)} are not of one kind of examples; for '
      f'config.task={TASK_OF[labels]!r} there are {known}{_elsewhere(columns, options, labels)}'
    )
  given = _given(source, columns, options, labels)
  found = {}
  for kind in named:
    parts = _completed(kind, columns, given, labels)
    if set(groups[kind].needed) <= set(parts):
      found[kind] = parts
  if 'images' in found:
    found.pop('texts', None)
  if len(found) == 1:
    ((kind, parts),) = found.items()
    label = parts.pop('label', ())
    return Parts(kind, {part: name for part, (name,) in parts.items()}, label)
  if found:
    said = f'its columns may be read as {" or as ".join(found)}'
    option = groups[next(iter(found))].needed[0]
  else:
    kind = min(named, key=lambda kind: _distance(kind, columns, given, labels))
    option, *_ = _lacking(kind, columns, given, labels)
    said = f'which column is the {option} of {kind}?'
  base = source.partition('?')[0]
  raise ValueError(
    f'{source}: {said} Say it, as in {base}?{option}=COLUMN; {_there(columns)}'
    f'{_elsewhere(columns, options, labels)}'
  )


def _there(columns: Mapping[str, Column]) -> str:
  return 'there is ' + ', '.join(f'{name!r} ({column.type})' for name, column in columns.items())


def _elsewhere(columns: Mapping[str, Column], options: Mapping[str, str], labels: str) -> str:
  """The task that could learn the columns where the wanted one cannot; '' for none."""
  if labels == NOTHING:  # which leaves out what others learn
    return ''
  for other in (TAGS, ANSWERS, PREFERENCES, SETS, CLASSES):
    for kind, group in GROUPS[other].items():
      if other == labels or not set(options) <= set(group.parts):
        continue
      given = {}
      for part, name in options.items():
        if name in columns and columns[name].kind in _fit(part, other)[0]:
          given[part] = (name,)
      parts = _completed(kind, columns, given, other)
      if set(given) == set(options) and set(group.needed) <= set(parts):
        task = 'language' if kind in ('chats', 'completions') else TASK_OF[other]
        return f'; these are {kind} of config.task={task!r}'
  return ''


def _given(
  source: str, columns: Mapping[str, Column], options: Mapping[str, str], labels: str
) -> dict[str, tuple[str, ...]]:
  """{part: its columns} of options: several for a label, with commas, where its kind may have them.

  Raises:
    ValueError: no such column, or one of another type.
  """
  found = {}
  for part, text in options.items():
    names: tuple[str, ...] = (text,)
    if part == 'label' and labels in (NUMBERS, SETS) and text not in columns:
      names = tuple(text.split(','))
    for name in names:
      if name not in columns:
        raise ValueError(f'{source} has no column {name!r}; {suggestion(name, columns)}')
      if columns[name].kind not in _fit(part, labels, len(names))[0]:
        raise _unfit(source, part, name, columns, options, labels, len(names))
    found[part] = names
  return found


def check_types(source: str, columns: Mapping[str, Column], parts: Parts, labels: str) -> None:
  """Raises a ValueError if a column of a table has another type than one of its part may have.

  Args:
    source: what has the columns, for messages.
    columns: of the table; some of the parts may be missing.
    parts: of the whole source.
    labels: the kind that is wanted.
  """
  used = [*parts.names.items(), *(('label', name) for name in parts.label)]
  for part, name in used:
    fits = (*_fit(part, labels, len(parts.label))[0], 'null')
    if name in columns and columns[name].kind not in fits:
      raise _unfit(source, part, name, columns, {}, labels, len(parts.label))


def _unfit(
  source: str,
  part: str,
  name: str,
  columns: Mapping[str, Column],
  options: Mapping[str, str],
  labels: str,
  count: int,
) -> ValueError:
  """What is said of a column that cannot be a part.

  Args:
    source, part, name, columns: its source, the part, its name, all columns of the source.
    options: {part: the column that was named}.
    labels: the kind that is wanted.
    count: how many columns the part has.
  """
  _, wanted = _fit(part, labels, count)
  return ValueError(
    f'{source}: {name!r} is a column of {columns[name].type}, and cannot be the {part}{wanted}; '
    f'{_there(columns)}{_elsewhere(columns, options, labels)}'
  )


def _fit(part: str, labels: str, count: int = 1) -> tuple[tuple[str, ...], str]:
  """(kinds of columns that a part can be, ', which is ...' of a label)."""
  if (part, labels) == ('prompt', PREFERENCES):
    return ('text', 'messages'), ''
  if part != 'label':
    return FITS[part], ''
  fits, wanted = _FIT_LABELS[labels]
  if count > 1 and labels == SETS:
    fits, wanted = _FIT_MEMBERS
  return fits, f', which is {wanted}'


def _lacking(
  kind: str, columns: Mapping[str, Column], given: Mapping[str, tuple[str, ...]], labels: str
) -> list[str]:
  """The parts of a kind of examples that no column is found for."""
  found = _completed(kind, columns, given, labels)
  return [part for part in GROUPS[labels][kind].needed if part not in found]


def _distance(
  kind: str, columns: Mapping[str, Column], given: Mapping[str, tuple[str, ...]], labels: str
) -> tuple[int, int]:
  """(parts that no column can be, parts that no column is found for) of a kind of examples."""
  lacking = _lacking(kind, columns, given, labels)
  kinds = {column.kind for column in columns.values()}
  impossible = [part for part in lacking if not kinds & set(_fit(part, labels)[0])]
  return len(impossible), len(lacking)


def _completed(
  kind: str, columns: Mapping[str, Column], given: Mapping[str, tuple[str, ...]], labels: str
) -> dict[str, tuple[str, ...]]:
  """{part: its columns}, those that are named and those that can be only one."""
  parts = dict(given)
  # What is learned is chosen first, since the only column of texts may be it.
  group = sorted(GROUPS[labels][kind].parts, key=lambda part: part not in LABELS)
  for part in group:
    if part in parts:
      continue
    fits, _ = _fit(part, labels)
    taken = [name for names in parts.values() for name in names]
    free = {
      name: column for name, column in columns.items() if name not in taken and column.kind in fits
    }
    for may_be in _MARKS.get((part, labels), _MARKS.get(part, (_called(part),))):
      fit = [name for name, column in free.items() if may_be(name, column)]
      if len(fit) == 1:
        parts[part] = (fit[0],)
        break
  return parts


# ---- What marks the column of a part, the surest mark first: it must be the only one that has it.

Mark = Callable[[str, Column], bool]  # (name, column)


def _called(*names: str) -> Mark:
  def mark(name: str, column: Column) -> bool:
    return name in names

  return mark


def _of_type(*kinds: str) -> Mark:
  def mark(name: str, column: Column) -> bool:
    return column.kind in kinds

  return mark


def _ends_with(end: str) -> Mark:
  def mark(name: str, column: Column) -> bool:
    return name.endswith(end)

  return mark


def _both(one: Mark, other: Mark) -> Mark:
  def mark(name: str, column: Column) -> bool:
    return one(name, column) and other(name, column)

  return mark


# Of other parts it is their name.
_MARKS: dict[str | tuple[str, str], tuple[Mark, ...]] = {
  ('label', CLASSES): (_of_type('class'), _called('label', 'labels')),
  ('label', NUMBERS): (
    _called('label', 'labels'),
    _of_type('number', 'decimal'),
    _of_type('class'),
  ),
  ('label', SETS): (_of_type('classes'), _called('label', 'labels')),
  'image': (_both(_called('image'), _of_type('image')), _of_type('image')),
  'text': (_called('text'), _of_type('text')),
  'pair': (),
  'tokens': (_called('tokens'), _called('words'), _of_type('texts')),
  'tags': (_called('tags'), _of_type('classes'), _ends_with('_tags')),
  'answers': (_called('answers'), _of_type('answers')),
}
