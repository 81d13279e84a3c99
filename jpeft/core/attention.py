"""One door to the queries, keys and values of an attention module, wherever it computes them.

A module that calls its own field `attention_fn` gets another function there. For modules that
compute attention inline, an anatomy may hold the same forward pass written against an attention
function (`Anatomy.attention`): it runs in place of the module's own while a rule wraps attention.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

from . import dot_product
from .anatomy import Anatomy
from .rules import Call
from .sites import Site

# {path of a site: what the rules that run wrap around its attention function, the outermost rule's
# first}; of modules that compute attention inline.
Wraps = dict[str, tuple[Callable, ...]]
_wraps: contextvars.ContextVar[Wraps] = contextvars.ContextVar('jpeft_wraps')


def refusal(rule: Call, site: Site) -> str | None:
  """Why a rule cannot reach the attention of a module, as a sentence; None if it can."""
  where = f'{rule.name}: {site.kind} at {site.path!r}'
  anatomy = site.model.anatomy
  if site.heads is not None:
    if site.inline and rule.method != '__call__':
      return f'{where} attends inline, where a rule reaches attention in its __call__ alone'
    return None
  if site.inline_fault:
    return f'{where} calls no attention_fn of its own, and {site.inline_fault}'
  ways_out = 'give its class that field, or its anatomy `attention` (jpeft.register_anatomy)'
  if anatomy is not None and anatomy.attention is not None:
    ways_out = f'the anatomy {anatomy.name!r} has the attention of its {{attention}} alone'
  return (
    f'{where} calls no attention_fn of its own, through which rules reach queries, keys and '
    f'values: {ways_out}'
  )


def wraps() -> Wraps:
  """What the rules that run wrap around inline attention."""
  return _wraps.get({})


@contextlib.contextmanager
def wrapped(now: Wraps) -> Iterator[None]:
  """A context in which inline attention is wrapped so."""
  token = _wraps.set(now)
  try:
    yield
  finally:
    _wraps.reset(token)


def wrapped_too(path: str, wrap: Callable):
  """A context in which the inline attention at a path is wrapped by one function more."""
  return wrapped({**wraps(), path: (*wraps().get(path, ()), wrap)})


def inline(site: Site, module, call: Callable) -> Callable:
  """The call of a module, or the form that its family has of it.

  The form runs while rules wrap its attention, and in long contexts, where its attention function
  makes no whole scores.
  """

  def run(*args, **kwargs):
    here = wraps().get(site.path, ())
    anatomy = site.model.anatomy
    by_rows = anatomy.attention_fn is dot_product.dot_product_attention
    if not here and not (by_rows and _is_long(args, kwargs)):
      return call(*args, **kwargs)
    wrapped_fn = anatomy.attention_fn
    for wrap in here:
      wrapped_fn = wrap(wrapped_fn)
    called = []

    def attention_fn(*inputs, **options):
      called.append(True)
      return wrapped_fn(*inputs, **options)

    out = anatomy.attention(module, attention_fn, *args, **kwargs)
    if not called:
      raise ValueError(f'{never_called(anatomy)} at {site.path!r}')
    return out

  return run


def _is_long(args, kwargs) -> bool:
  """Whether a module that attends is called with a sequence [B, N, D] of a long context."""
  sequences = [x for x in jax.tree.leaves((args, kwargs)) if getattr(x, 'ndim', 0) == 3]
  return bool(sequences) and dot_product.is_long(sequences[0].shape[1], sequences[0].shape[1])


def never_called(anatomy: Anatomy) -> str:
  return f'the `attention` of the anatomy {anatomy.name!r} never calls the attention_fn it is given'
