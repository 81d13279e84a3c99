"""attach(model, method, backbone, *example) -> Tuned: pure functions, resolved once, from
shapes.
"""

import jax

from .discover import sites_of
from .rules import Call, Method, Rule, Weight
from .sites import Site, Sites
from .tuned import Tuned, _changes


def attach(model, method: Method, backbone, /, *args, **kwargs) -> Tuned:
  """Resolves `method` against `model`.

  Args:
    model: a Linen or an NNX module; it is read, never changed.
    method: such as `lora(8)` or `chain(lora(8), tune('{head}'))`.
    backbone: what the model holds: Linen's variables, or `nnx.state(model)`; shapes will do.
    *args: an example input; shapes (jax.ShapeDtypeStruct) will do.
    **kwargs: keyword arguments of the forward pass.

  Raises:
    ValueError: a pattern matches no site, or no site that its rule can adapt; two rules of one
      name meet at a site.
  """
  sites = sites_of(model, backbone, *args, **kwargs)
  rules = [(rule, site) for pattern, rule in method for site in _match(pattern, rule, sites)]
  rules.sort(
    key=lambda pair: isinstance(pair[0], Call)
  )  # arrays come before the call that reads them
  seen = set()
  for rule, site in rules:
    what = (rule.name, site.path, getattr(rule, 'method', '__call__'))
    if what in seen:
      raise ValueError(
        f'two rules called {rule.name!r} meet at {site.path!r}; give one of the methods '
        'another name='
      )
    seen.add(what)
  tuned = Tuned(model, tuple(rules), sites, Method(method), jax.eval_shape(lambda: backbone))
  for rule, site, _ in tuned._plan[0]:
    _check_requirement(rule, site, fused=(rule, site) in tuned._plan[1].get(site.path, ()))
  jax.tree.leaves(tuned.shapes)  # what a rule's `init` refuses is said here, not at the first step
  return tuned


def _match(pattern: str, rule: Rule, sites: Sites) -> list[Site]:
  """The sites a rule acts on; says what was near when there are none."""
  hits = sites.find(pattern)
  good = [
    s for s in hits if (rule.method in s.methods if isinstance(rule, Call) else _changes(rule, s))
  ]
  if not good:
    why = f'{len(hits)} sites match, but none has what it adapts' if hits else 'no site matches'
    raise ValueError(
      f'{rule.name}: {why}: {pattern!r}. Near it, of {len(sites)} sites: '
      f'{", ".join(sites.nearest(pattern))}'
    )
  return good


def _check_requirement(rule: Weight, site: Site, fused: bool) -> None:
  """Raises a ValueError if a rule must act on the input of a layer and cannot."""
  if rule.requires == 'nothing' or fused:
    return
  what, way_out = 'the rule acts', ''
  if rule.requires == 'input in training':
    what, way_out = 'dropout acts', '; use dropout=0'
  raise ValueError(
    f'{rule.name} at {site.path!r}: {what} on the input of a layer, and '
    f'{site.kind or "this module"} offers no injection point for it{way_out}'
  )
