"""What chat templates do and make, counted: the same on every machine, unlike seconds and bytes.

Counted are the rounds of loops and the calls of macros, each with what its body has to do, and the
characters and items of every value, before it is made.
"""

import contextlib
import contextvars
import re
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

WORK = 10**7  # operations, about five seconds of them
TEXT = 2**26  # characters that are written and made on the way, and bytes of new lists
_FOR_EACH = 16  # times that what is given may be made in addition
_ITEM = 32  # characters that an item of a list counts as
_WIDEST = 10**5  # columns or places that a text may be filled up to
_BITS = 2**14  # of an integer
# Filters and methods that fill up by a number.
_WIDENING = frozenset(
  ('batch', 'center', 'expandtabs', 'indent', 'ljust', 'rjust', 'round', 'slice', 'tojson')
  + ('wordwrap', 'zfill')
)
# Those that take long for many letters, that make many pieces, that make a list of what is there,
# and that make no text.
_SLOW = frozenset(('pprint', 'striptags', 'sum', 'urlize', 'wordwrap', 'xmlattr'))
_SLOW_TEXT = 2**16
_CUTTING = frozenset(('list', 'rsplit', 'split', 'splitlines'))
_LISTING = frozenset(
  ('batch', 'copy', 'dictsort', 'groupby', 'items', 'list', 'max', 'min', 'reverse', 'slice')
  + ('sort', 'unique')
)
_READING = frozenset(('count', 'endswith', 'find', 'index', 'rfind', 'rindex', 'startswith'))
_WIDTH = re.compile(r'\d{6}|\{[^{}]*\{|%[^%a-zA-Z]*\*')


class TooMuch(Exception):
  """A template does or makes too much."""


class _Spent:
  """What a template has done and made so far, and how much that may be."""

  def __init__(self, given: int):
    self.work = WORK + given
    self.text = TEXT + _FOR_EACH * given

  def add(self, work: int, text: int) -> None:
    self.work -= work
    self.text -= text
    if self.work < 0:
      raise TooMuch(f'it does more than {WORK:,} operations')
    if self.text < 0:
      raise TooMuch(f'it makes more than {TEXT:,} characters')


_spent: contextvars.ContextVar[_Spent] = contextvars.ContextVar('spent')


@contextlib.contextmanager
def counted(given: Any = ()) -> Iterator[None]:
  """Counts from nothing what a template does in the block; to be around all of the following.

  Args:
    given: what it is called with; of more it may make more.
  """
  token = _spent.set(_Spent(0))
  try:
    _spent.set(_Spent(extent(given)))
    yield
  finally:
    _spent.reset(token)


def add(work: int, text: int = 0) -> None:
  """Counts operations, and characters that they write; raises TooMuch."""
  _spent.get().add(work, text)


def make(text: int) -> None:
  """Counts a value of so many characters and items before it is made; raises TooMuch."""
  add(1 + text // 1024, text)


def extent(value: Any) -> int:
  """Characters and items of a value as it would be written, shared parts as often as they occur."""
  if isinstance(value, str):
    return len(value)
  total = count = 0
  left = [value]
  while left:
    item = left.pop()
    count += 1
    total += _ITEM
    if isinstance(item, str):
      total += len(item)
    elif isinstance(item, Mapping):
      left += item.keys()
      left += item.values()
    elif isinstance(item, (list, tuple, set, frozenset, KeysView, ItemsView, ValuesView)):
      left += item
    elif isinstance(item, range):
      total += _ITEM * len(item)
    elif type(item).__name__ == 'Namespace':  # of Jinja, which writes what it holds
      left += object.__getattribute__(item, '__dict__').values()
    if total > TEXT:
      raise TooMuch(f'it makes a value of more than {TEXT:,} characters')
  add(count)
  return total


def hold(value: Any) -> None:
  """Counts a new list, tuple or dict of what is there already; raises TooMuch."""
  extent(value)
  add(1, _ITEM * len(value))


def see(value: Any) -> None:
  """Counts a value that is compared; raises TooMuch."""
  add(1 + extent(value) // 1024)


def check_call(name: str, subject: Any, given: Iterable[Any]) -> None:
  """Counts a filter, or a method of a text or list, before it is called; raises TooMuch.

  Args:
    name: of it.
    subject: what it is called on.
    given: its arguments.
  """
  given = list(given)
  numbers = [int(min(abs(x), 2 * _WIDEST)) for x in given if isinstance(x, (int, float))]
  if name in _WIDENING and max(numbers, default=0) > _WIDEST:
    raise TooMuch(f'it fills up by {name!r} to more than {_WIDEST:,}')
  if name in _READING:
    see(subject)
    return
  if name in _LISTING and hasattr(subject, '__len__') and not isinstance(subject, str):
    add(extent(subject) // _ITEM, _ITEM * (len(subject) + sum(numbers)))
    return
  held = extent(subject)
  more = sum(map(extent, given))
  if name in _SLOW and held + more > _SLOW_TEXT:
    raise TooMuch(f'it calls {name!r} on more than {_SLOW_TEXT:,} characters')
  make(held + _grown(name, subject, given, held, more + sum(numbers)))


def _grown(name: str, subject: Any, given: list[Any], held: int, more: int) -> int:
  """Characters that a filter or method adds to its subject.

  Args:
    name, subject, given: see `check_call`.
    held: extent of the subject.
    more: of what is given, each number as the places that it may stand for.
  """
  text = subject if isinstance(subject, str) else ''
  if name in _CUTTING:
    return 4 * held
  if name == 'replace' and len(given) > 1:
    old, new = str(given[0]), str(given[1])
    return (str(subject).count(old) if old else held + 1) * len(new)
  if name == 'join':
    items = given[0] if text and given else subject
    return more + (len(items) if hasattr(items, '__len__') else 1) * min(held, more)
  if name in ('format', 'format_map', 'translate'):
    if _WIDTH.search(text):
      raise TooMuch('it fills up by a format to more than 99,999, or to what a value says')
    places = len(text) if name == 'translate' else text.count('{') + text.count('%')
    return places * more
  if name in _WIDENING:
    lines = 1 + text.count('\n') + text.count('\t')
    return more * (lines if text else held)
  return more


def check_numbers(operator: str, left, right) -> None:
  """Raises TooMuch for an integer that would be too long."""
  if not isinstance(left, int) or not isinstance(right, int):
    return
  bits = max(left.bit_length(), right.bit_length()) + 1
  if operator == '*':
    bits = left.bit_length() + right.bit_length()
  elif operator == '**':
    bits = left.bit_length() * abs(right)
  if bits > _BITS:
    raise TooMuch(f'it makes a number of more than {_BITS:,} bits')


def times(left: Any, right: Any) -> int:
  """What a text or list takes that is repeated."""
  if isinstance(left, int):
    left, right = right, left
  if not isinstance(right, int):
    return 0  # Python refuses it
  return extent(left) * max(0, right)


def check_sum(left: Any, right: Any) -> None:
  """Counts a text or list that is put together of two; raises TooMuch."""
  if isinstance(left, str):
    make(extent(left) + extent(right))
    return
  if extent(left) + extent(right) > TEXT:
    raise TooMuch(f'it makes a value of more than {TEXT:,} characters')
  items = sum(len(part) for part in (left, right) if hasattr(part, '__len__'))
  add(1, _ITEM * items)
