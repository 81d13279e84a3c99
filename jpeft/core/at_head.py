"""Another function of the head's input in place of a model's logits.

Logits [B, N, V] of a large vocabulary are the largest array of many programs that need less: the
loss of each token, or the word after the last one. Rules give it: one at the model takes what is
asked for, one at the head makes it of [B, N, D]. Where a word table makes logits and the head only
changes them, as a bias does, the rule at the table leaves its input to the head, which runs both.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

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

  `apply(..., **{argument: value})` of the first gives make(value, head, arrays, x), for
  head(arrays, x [B, n, D]) -> logits [B, n, V]; without that argument it gives logits. theta is the
  same. It raises a `NotAtHead` while it is traced if the model makes something else of its logits.

  Args:
    tuned: of a model whose output is what its head returns, [B, N, V].
    name: of the rules.
    argument: of the model's call.
    make: (value, head, the arrays that it reads, its input x [B, N, D]) -> an array.
    training: whether the method trains: what drops out at the head then belongs to one whole call.
  """
  head, method, reason = _head_of(tuned.sites)
  if head is None:
    return tuned, reason
  table = _table_before(head)
  used = {(head.path, method)}
  if table is not None:
    used.add((table.path, table.methods[-1]))
  for rule, site in tuned.rules:
    if (site.owner, rule.method) not in used:
      continue
    if isinstance(rule, Call):
      return tuned, f'{rule.name} wraps the head {site.owner!r}'
    if training and rule.requires == 'input in training':
      return tuned, f'{rule.name} drops out at the head {site.owner!r}'
  asked = _Asked(argument, make)
  rules = [
    (Call(name, asked.model, takes=(argument,)), tuned.sites['']),
    (Call(name, asked.head, method=method), head),
  ]
  if table is not None:
    rules.append((Call(name, asked.table, method=table.methods[-1]), table))
  method_with = chain(tuned.method, *(at(site.path, rule) for rule, site in rules))
  made = dataclasses.replace(tuned, rules=(*tuned.rules, *rules), method=method_with, begin=None)
  return made, ''


def _head_of(sites: Sites) -> tuple[Site | None, str, str]:
  """(the module whose output is that of the model, the method of it, why there is none)."""
  out = sites[''].out
  if out is None or not hasattr(out, 'shape') or len(out.shape) != 3:
    return None, '', 'the model does not return logits [B, N, V] alone'
  if sites.anatomy is None:
    return None, '', 'the model is of no known family: describe it by jpeft.register_anatomy'
  for site in sites.of_role('head'):
    if site.out is not None and site.out.shape == out.shape and not site.axes:
      return site, '__call__', ''
  # A tied head is another method of the module that embeds, called after that which does.
  for site in _tables(sites):
    return site, site.methods[-1], ''
  return None, '', 'no module of it, {head} or a method of {embed}, makes its output'


def _tables(sites: Sites) -> Iterator[Site]:
  """Word tables that are read twice: a later method makes logits of hidden states."""
  for role in ('word', 'embed'):
    for site in sites.find(f'{{{role}}}') if role in sites.anatomy.roles else []:
      if len(site.methods) > 1 and not site.axes:
        yield site


def _table_before(head: Site) -> Site | None:
  """The word table that makes the logits which a head, such as a bias, only changes; else None."""
  logits = head.model[''].out
  changes_logits = any(x.shape == logits.shape for x in head.inputs.values())
  tables = (site for site in _tables(head.model) if site.path != head.path)
  return next(tables, None) if changes_logits else None


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
      raise NotAtHead('the model changes what its head returns, where logits must be whole')
    return out

  def table(self, t, call, x, *args, **kwargs):
    """Leaves its input to the head; what it returns is read by nothing."""
    if call.root['asked'] is None:
      return call(x, *args, **kwargs)
    run, arrays = call.pure()
    logits = call.site.model[''].out
    out = jnp.broadcast_to(jnp.zeros((), logits.dtype), (*x.shape[:-1], logits.shape[-1]))

    def run_table(arrays, x):
      return run(arrays, x, *args, **kwargs)

    call.root['table'] = (run_table, arrays, x, out)
    return out

  def head(self, t, call, x, *args, **kwargs):
    value = call.root['asked']
    if value is None:
      return call(x, *args, **kwargs)
    run_table, before, given, unread = call.root.get('table') or (None, None, x, x)
    if x is not unread:
      raise NotAtHead(
        f'the model changes what the head {call.site.path!r} reads, where logits must be whole'
      )
    run, own = call.pure()

    def head(arrays, x):
      own, before = arrays
      if run_table is not None:
        x = run_table(before, x)
      return run(own, x, *args, **kwargs)

    made = self.make(value, head, (own, before), given)
    call.root['made'] = made
    return made
