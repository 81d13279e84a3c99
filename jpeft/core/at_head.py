"""Another function of the head's input in place of a model's logits.

Logits [B, N, V] of a large vocabulary are the largest array of many programs that need less: the
loss of each token, or the word after the last one. Two rules give it: one at the model takes what
is asked for, one at the head makes it of [B, N, D].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from .rules import Call, at, chain
from .sites import Site, Sites
from .tuned import Tuned


class NotAtHead(ValueError):
  """A model whose output is not what its head returns."""


def at_head(
  tuned: Tuned,
  name: str,
  argument: str,
  make: Callable[..., jax.Array],
  training: bool,
) -> tuple[Tuned, str]:
  """(a Tuned that gives `make` of the head's input, ''), or (the same Tuned, why it cannot).

  `apply(..., **{argument: value})` of the first gives make(value, call, x, *args, **kwargs);
  without that argument it gives logits. theta is the same. It raises a `NotAtHead` while it is
  traced if the model makes something else of what its head returns.

  Args:
    tuned: of a model whose output is what its head returns, [B, N, V].
    name: of the two rules.
    argument: of the model's call.
    make: (value, call of the head, its input x [B, N, D], ...) -> an array.
    training: whether the method trains: what drops out at the head then belongs to one whole call.
  """
  head, method, reason = head_of(tuned.sites)
  if head is None:
    return tuned, reason
  for rule, site in tuned.rules:
    if site.owner != head.path or rule.method != method:
      continue
    if isinstance(rule, Call):
      return tuned, f'{rule.name} wraps the head {head.path!r}'
    if training and rule.requires == 'input in training':
      return tuned, f'{rule.name} drops out at the head {head.path!r}'
  asked = _Asked(argument, make)
  at_model = Call(name, asked.model, takes=(argument,))
  around_head = Call(name, asked.head, method=method)
  rules = ((at_model, tuned.sites['']), (around_head, head))
  method_with = chain(tuned.method, *(at(site.path, rule) for rule, site in rules))
  made = dataclasses.replace(tuned, rules=(*tuned.rules, *rules), method=method_with, begin=None)
  return made, ''


def head_of(sites: Sites) -> tuple[Site | None, str, str]:
  """(the module whose output is that of the model, the method of it, why there is none)."""
  out = sites[''].out
  if out is None or not hasattr(out, 'shape') or len(out.shape) != 3:
    return None, '', 'the model does not return logits [B, N, V] alone'
  anatomy = sites.anatomy
  if anatomy is None:
    return None, '', 'the model is of no known family: describe it by jpeft.register_anatomy'
  for site in sites.find('{head}') if 'head' in anatomy.roles else []:
    if site.out is not None and site.out.shape == out.shape and not site.axes:
      return site, '__call__', ''
  # A tied head is another method of the module that embeds, called after that which does.
  for site in sites.find('{embed}'):
    if len(site.methods) > 1 and not site.axes:
      return site, site.methods[-1], ''
  return None, '', 'no module of it, {head} or a method of {embed}, makes its output'


@dataclasses.dataclass(frozen=True)
class _Asked:
  """What is asked of a call of the model, and made in its head."""

  argument: str
  make: Callable[..., jax.Array]

  def model(self, t, call, *args, **kwargs):
    """Runs the model; where something is asked, its output is what the head made."""
    value = kwargs.pop(self.argument, None)
    call.local['asked'] = value
    out = call(*args, **kwargs)
    if value is not None and out is not call.local.get('made'):
      raise NotAtHead('the model changes what its head returns, and logits must be whole there')
    return out

  def head(self, t, call, x: Any, *args, **kwargs):
    value = call.root['asked']
    if value is None:
      return call(x, *args, **kwargs)
    made = self.make(value, call, x, *args, **kwargs)
    call.root['made'] = made
    return made
