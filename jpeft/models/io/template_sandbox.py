"""Chat templates, which come with checkpoints: they run in a sandbox, which counts what they do."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jpeft.lazy import extra

from .template_costs import (
  add,
  check_call,
  check_numbers,
  check_sum,
  counted,
  extent,
  hold,
  make,
  see,
  times,
)

with extra('llm'):
  import jinja2
  from jinja2 import nodes
  from jinja2.ext import Extension
  from jinja2.runtime import LoopContext
  from jinja2.sandbox import ImmutableSandboxedEnvironment
  from jinja2.visitor import NodeTransformer

LONGEST = 2**18  # characters of a template
_ROUND = 5  # operations that a round of a loop is at least
# Filters that look at no more than the head of a value, or hand its items on one by one.
_LIGHT = frozenset(('count', 'd', 'default', 'first', 'last', 'length', 'map'))
_LIGHT |= {'attr', 'items', 'random', 'reject', 'rejectattr', 'reverse', 'select', 'selectattr'}
_COMPARING = frozenset(('in', 'eq', '==', 'equalto', 'ne', '!=', 'lt', '<', 'lessthan', 'le', '<='))
_COMPARING |= {'gt', '>', 'greaterthan', 'ge', '>='}


@functools.lru_cache(maxsize=16)
def compiled(template: str, marks: tuple[str, str]) -> jinja2.Template:
  """A chat template, for `render`.

  Args:
    template: its text.
    marks: what is written before and behind the content of a {% generation %} block.

  Raises:
    Exception: it is no template, or a ValueError: it is too long.
  """
  if len(template) > LONGEST:
    raise ValueError(f'it has {len(template):,} characters, and at most {LONGEST:,} are read')
  with counted():
    return _Environment(marks).from_string(template)


def render(template: jinja2.Template, names: Mapping[str, Any]) -> str:
  """What a template writes.

  Raises:
    Exception: of any kind, as its statements do; TooMuch, where it does or makes too much.
  """
  with counted(names):
    return template.render(names)


# ---- What is put into a template.


class _Generation(Extension):
  """{% generation %} ... {% endgeneration %}, around what the model writes: marked content."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    opening, closing = (nodes.Output([nodes.TemplateData(mark)]) for mark in self.environment.marks)
    return nodes.Scope([opening, *body, closing], lineno=line)


class _Counting(NodeTransformer):
  """Puts a count into every body that may run again, and around values that are put together."""

  def visit_For(self, node):
    return self._in_body(node)

  visit_Macro = visit_CallBlock = visit_Block = visit_For

  def _in_body(self, node):
    work, text = _own(node)
    self.generic_visit(node)
    count = _call('step', nodes.Const(max(work, _ROUND)), nodes.Const(text))
    node.body = [nodes.ExprStmt(count), *node.body]
    if isinstance(node, nodes.For) and node.test is not None:
      node.test = nodes.And(_call('step', nodes.Const(_ROUND), nodes.Const(0)), node.test)
    return node

  def visit_Concat(self, node):
    self.generic_visit(node)
    return _call('joined', *node.nodes)

  def visit_List(self, node):
    self.generic_visit(node)
    return _call('held', node)

  visit_Dict = visit_List

  def visit_Tuple(self, node):
    self.generic_visit(node)
    return node if node.ctx == 'store' else _call('held', node)

  def visit_Compare(self, node):
    self.generic_visit(node)
    node.expr = _call('seen', node.expr)
    return node

  visit_Operand = visit_Compare


def _call(name: str, *args) -> nodes.Call:
  """A call of a method of the environment."""
  return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _own(node: nodes.Node) -> tuple[int, int]:
  """(nodes, characters) of a body, without those of bodies in it, which count for themselves."""
  work = text = 0
  left = list(node.iter_child_nodes())
  while left:
    item = left.pop()
    work += 1
    if isinstance(item, nodes.TemplateData):
      text += len(item.data)
    elif isinstance(item, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
      continue
    left += item.iter_child_nodes()
  return work, text


class _Environment(ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset(('+', '*', '**', '%'))

  def __init__(self, marks: tuple[str, str]):
    self.marks = marks
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, 'jinja2.ext.loopcontrols'],
      optimized=False,  # else constants would be computed before anything is counted
      finalize=_finalized,
    )
    self.filters['tojson'] = _json
    self.filters = {name: _limited(name, fn) for name, fn in self.filters.items()}
    for name in _COMPARING & self.tests.keys():
      self.tests[name] = _compared(self.tests[name])
    del self.globals['lipsum']

  def _generate(self, source, name, filename, defer_init=False):
    source = _Counting().visit(source)
    source.set_environment(self)
    return super()._generate(source, name, filename, defer_init)

  def call(self, context, fn, /, *args, **kwargs):
    if getattr(fn, '__self__', None) is self:  # one of those below
      return fn(*args)
    args = tuple(map(_whole, args))
    # The text of a method; that of str.format is wrapped by the sandbox.
    subject = getattr(getattr(fn, '__wrapped__', fn), '__self__', None)
    if isinstance(subject, (str, list, tuple, dict)):
      name = getattr(fn, '__name__', '')
      if isinstance(subject, str) or name in ('copy', 'count', 'index'):
        check_call(name, subject, [*args, *kwargs.values()])
    return super().call(context, fn, *args, **kwargs)

  def call_binop(self, context, operator, left, right):
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
      check_numbers(operator, left, right)
    elif operator == '*':
      make(times(left, right))
    elif operator == '%' and isinstance(left, str):
      check_call('format', left, [right])
    elif operator == '+':
      check_sum(left, right)
    return super().call_binop(context, operator, left, right)

  # ---- What _Counting puts in.

  def step(self, work: int, text: int) -> bool:
    add(work, text)
    return True

  def held(self, value):
    hold(value)
    return value

  def seen(self, value):
    see(value)
    return value

  def joined(self, *values) -> str:
    make(sum(map(extent, values)))
    return ''.join(map(str, values))


@jinja2.pass_context
def _finalized(context, value):
  """A value that is written."""
  make(extent(value))
  return value


def _limited(name: str, fn: Callable) -> Callable:
  """A filter that counts what it makes."""
  passed = 1 if hasattr(fn, 'jinja_pass_arg') else 0

  @functools.wraps(fn)
  def limited(*args, **kwargs):
    subject, *given = args[passed:]
    if name not in _LIGHT:
      subject = _whole(subject)
      check_call(name, subject, [*given, *kwargs.values()])
    found = fn(*args[:passed], subject, *given, **kwargs)
    return _each(found) if isinstance(found, Iterator) else found

  return limited


def _compared(fn: Callable) -> Callable:
  """A test that counts what it compares."""

  @functools.wraps(fn)
  def compared(*values):
    for value in values:
      see(value)
    return fn(*values)

  return compared


def _whole(value: Any) -> Any:
  """A list in place of an iterator, whose items can be counted."""
  if isinstance(value, Iterator) and not isinstance(value, LoopContext):
    return list(value)
  return value


def _each(items: Iterator) -> Iterator:
  """The items, each counted."""
  for item in items:
    make(extent(item))
    yield item


def _json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """JSON of a value for a template; that of Jinja would escape < and > as for a web page."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
