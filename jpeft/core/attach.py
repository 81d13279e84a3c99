"""attach(model, method, backbone, *example) -> Tuned, resolved once, from shapes."""

import re

import jax

from .anatomy import MAPS, NOTHING
from .attention import refusal
from .discover import sites_of
from .entries import unused_name
from .example import specs_of
from .layers import restricted
from .paths import leaf_paths
from .preparation import unprepared
from .resolve import changes, plan
from .rules import Call, Method, Rule, Weight
from .sites import Site, Sites, overlap, roles_of
from .tuned import Tuned


def attach(model, method: Method, backbone, /, *args, **kwargs) -> Tuned:
  """Resolves `method` against `model`.

  Args:
    model: a Linen or an NNX module; it is read, never changed.
    method: such as `lora(8)` or `chain(lora(8), tune('{head}'))`.
    backbone: what the model stores: Linen's variables, or `nnx.state(model)`; shapes will do.
    *args: an example input; shapes (jax.ShapeDtypeStruct) will do.
    **kwargs: keyword arguments of the forward pass, and those that rules take for themselves.

  Raises:
    ValueError: a pattern matches no site, or no site that its rule can adapt; two rules of one
      name meet at a site; or the method waits for a pass over training examples.
  """
  for preparation in unprepared(method):
    raise ValueError(
      f'{preparation.name} {preparation.what} in a pass over training examples, which has not been '
      'made: method = jpeft.prepare(method, model, backbone, batches), and then attach'
    )
  taken = {name for _, rule in method for name in rule.takes}
  of_model = {name: value for name, value in kwargs.items() if name not in taken}
  sites = sites_of(model, backbone, *args, **of_model)
  rules = [(rule, site) for pattern, rule in method for site in _match(pattern, rule, sites)]
  # Weights first: arrays come before the call that reads them.
  rules.sort(key=lambda pair: isinstance(pair[0], Call))
  _check_names(rules)
  _check_takes(rules)
  _check_losses(rules)
  _check_generators(rules)
  _check_outer(rules, sites)
  _check_attention(rules)
  decided = plan(rules, sites)
  for rule, site, _ in decided.boxed:
    _check_requirement(rule, site, fused=(rule, site) in decided.wrapped.get(site.owner, ()))
  example = specs_of((args, kwargs))
  shapes = jax.eval_shape(lambda: backbone)
  tuned = Tuned(model, tuple(rules), sites, Method(method), shapes, example)
  _check_entries(tuned)  # and what a rule's `init` refuses is said here, not at the first step
  return tuned


def _match(pattern: str, rule: Rule, sites: Sites) -> list[Site]:
  """The sites that a rule acts on.

  Raises:
    ValueError: there are none; says what was near.
  """
  matching = sites.find(pattern)
  _check_parts(pattern, rule, matching)
  chosen = matching
  if rule.layers is not None:
    chosen = [restricted(site, rule.layers) for site in matching]
    chosen = [site for site in chosen if site is not None]
  found = [site for site in chosen if _can_act(rule, site)]
  if found:
    _check_alternatives(pattern, rule, sites)
    _check_shared(pattern, rule, found)
    return found
  if matching and not chosen:
    raise ValueError(
      f'{rule.name}: none of the {len(matching)} sites that match {pattern!r} is in the layers '
      f'{rule.layers!r}'
    )
  for site in matching:
    for name, owner in sites.aliases.items():
      if name.rpartition('/')[0] == site.path:
        raise ValueError(
          f'{rule.name}: {pattern!r} names {site.path!r}, whose {name!r} is the array {owner!r}: '
          f'name {owner.rpartition("/")[0]!r} instead'
        )
  why = 'no site matches'
  if matching:
    why = f'{len(matching)} sites match, but none has what it adapts'
    if isinstance(rule, Call):
      methods = dict.fromkeys(name for site in matching for name in site.methods)
      why = f'{why}, a call of its method {rule.method!r} (called: {", ".join(methods) or "none"})'
  hint = f'; {rule.hint}' if rule.hint else ''
  raise ValueError(
    f'{rule.name}: {why}: {pattern!r}{hint}{_family_of(pattern, sites)}. '
    f'Near it, of {len(sites)} sites: {", ".join(sites.nearest(pattern))}'
  )


def _family_of(pattern: str, sites: Sites) -> str:
  """The naming scheme that was taken for the model, for errors about patterns with roles."""
  if sites.anatomy is None or '{' not in pattern:
    return ''
  return (
    f' (the model is taken for a {sites.anatomy.name!r}; describe one of your own by '
    'jpeft.register_anatomy)'
  )


def _check_alternatives(pattern: str, rule: Rule, sites: Sites) -> None:
  """Raises a ValueError if one of several alternatives, as of '{q}|{v}', names nothing."""
  alternatives = _alternatives(pattern)
  if len(alternatives) == 1:
    return
  for alternative in alternatives:
    if not sites.find(alternative) and sites.expand(alternative) != f'(?:{NOTHING})':
      raise ValueError(
        f'{rule.name}: of {pattern!r}, {alternative!r} names nothing{_family_of(pattern, sites)}: '
        'leave it out, or see what it should be called'
      )


def _alternatives(pattern: str) -> list[str]:
  """What stands between the '|' of a pattern that are in no group."""
  found = ['']
  depth = 0
  for letter in re.findall(r'\\?.', pattern):  # an escaped letter is one
    depth += (letter in '([{') - (letter in ')]}')
    if letter == '|' and depth == 0:
      found.append('')
    else:
      found[-1] += letter
  return found


def _check_parts(pattern: str, rule: Rule, matching: list[Site]) -> None:
  """Raises a ValueError if a pattern names a part of a module, whose call a rule wraps."""
  if not isinstance(rule, Call):
    return
  for site in matching:
    if site.part:
      raise ValueError(
        f'{rule.name}: in {pattern!r}, {{{site.part}}} is a part of {site.owner!r} alone '
        f'({", ".join(site.leaves)}), and the rule wraps the call of a whole module: name that '
        'module instead'
      )


def _check_shared(pattern: str, rule: Rule, found: list[Site]) -> None:
  """Raises a ValueError if a role of a pattern has its arrays in common with one left out.

  Where a scheme says of a fused kernel only that it serves several roles, a rule that is asked for
  some of them would change the others too.
  """
  asked = [role for role in roles_of(pattern) if role in MAPS]
  if isinstance(rule, Call) or not asked:
    return
  for site in found:
    anatomy = site.model.anatomy
    here = [role for role in MAPS if role in anatomy.roles]
    here = [role for role in here if re.fullmatch(anatomy.modules(role), site.path)]
    left_out = [role for role in here if role not in asked]
    if not left_out or len(left_out) == len(here) or _is_named_otherwise(site, pattern, asked):
      continue
    kernels = set(site.matrices) & set(changes(rule, site))
    if kernels and kernels < set(site.matrices):
      continue  # the rule tells arrays apart itself
    named = '|'.join(f'{{{role}}}' for role in here)
    raise ValueError(
      f'{rule.name}: {pattern!r} names {site.path!r}, which by the scheme {anatomy.name!r} is '
      f'{", ".join(f"{{{role}}}" for role in left_out)} too: name all of it ({named!r}), or say '
      'what is which by jpeft.Part in jpeft.register_anatomy'
    )


def _is_named_otherwise(site: Site, pattern: str, asked: list[str]) -> bool:
  """Whether a pattern names a site without some of its roles."""

  def of_role(role: str) -> str:
    return NOTHING if role in asked else site.model.anatomy.role(role)

  return bool(re.fullmatch(site.model.expand(pattern, of_role), site.path))


def _can_act(rule: Rule, site: Site) -> bool:
  """Whether a site has the method that a Call wraps, or arrays that a Weight replaces."""
  if isinstance(rule, Call):
    return rule.method in site.methods
  return bool(changes(rule, site))


def _check_names(rules: list[tuple[Rule, Site]]) -> None:
  """Raises a ValueError if two rules of one name meet."""
  for rule, _ in rules:
    if '/' in rule.name or not rule.name:
      raise ValueError(f'the name of a rule, {rule.name!r}, must not be empty or have a "/"')
  seen = set()
  chosen = {}
  for rule, site in rules:
    if chosen.setdefault((rule.name, site.path), site.chosen) != site.chosen:
      raise ValueError(
        f'two rules called {rule.name!r} act in different layers of {site.path!r}; give one of the '
        'methods another name='
      )
    here = (rule.name, site.path, rule.method)
    if here in seen:
      raise ValueError(
        f'two rules called {rule.name!r} meet at {site.path!r}; give one of the methods '
        'another name='
      )
    seen.add(here)
  _check_overlaps(rules)


def _check_overlaps(rules: list[tuple[Rule, Site]]) -> None:
  """Raises a ValueError if a rule acts twice on entries of an array, by parts that overlap."""
  seen: dict[tuple[str, str, str], list[Site]] = {}
  for rule, site in rules:
    for name in changes(rule, site) if isinstance(rule, Weight) else ():
      others = seen.setdefault((rule.name, site.owner, name), [])
      for other in others:
        if (site.part or other.part) and overlap(site, other, name):
          raise ValueError(
            f'two rules called {rule.name!r} act on {name!r} at {other.path!r} and at '
            f'{site.path!r}, which overlap: name one of them, or give one of the methods another '
            'name='
          )
      others.append(site)


def _check_takes(rules: list[tuple[Rule, Site]]) -> None:
  """Raises a ValueError if a rule of a layer takes arguments of the model's call."""
  for rule, site in rules:
    if rule.takes and site.path:
      raise ValueError(
        f'{rule.name} at {site.path!r}: takes={rule.takes!r} are arguments of tuned.apply, which a '
        "rule at the model ('') alone gets"
      )


def _check_losses(rules: list[tuple[Rule, Site]]) -> None:
  """Raises a ValueError if several methods say what is minimised."""
  names = {rule.loss: rule.name for rule, _ in rules if rule.loss is not None}
  if len(names) > 1:
    raise ValueError(
      f'{" and ".join(names.values())} each say what training minimises (loss=): chain one of them'
    )


def _check_generators(rules: list[tuple[Rule, Site]]) -> None:
  """Raises a ValueError if entries that are made of a smaller tree would be lost."""
  generators = {rule.name: rule.generator for rule, _ in rules if rule.generator is not None}
  for rule, site in rules:
    if rule.name not in generators:
      continue
    if rule.generator is not generators[rule.name]:
      raise ValueError(
        f'two methods called {rule.name!r}, of which one is generated: give one another name='
      )
    if rule.stages:
      raise ValueError(
        f'{rule.name} at {site.path!r}: its stages name entries that are made of a smaller tree'
      )
    if rule.update is not None:
      raise ValueError(
        f'{rule.name} at {site.path!r}: update edits entries that are made of a smaller tree at '
        'each call, so that the edit would be lost'
      )


def _check_outer(rules: list[tuple[Rule, Site]], sites: Sites) -> None:
  """Raises a ValueError if what a Weight reads of a call around can never be there."""
  callers = {rule.name for rule, _ in rules if isinstance(rule, Call)}
  for rule, site in rules:
    if not isinstance(rule, Weight) or not rule.outer:
      continue
    names = ', '.join(rule.outer)
    if rule.name not in callers:
      raise ValueError(
        f'{rule.name} at {site.path!r} reads {names} of a call around it (outer=): chain a Call '
        f'called {rule.name!r} that puts that into call.local'
      )
    if not sites.takes_boxes:
      raise ValueError(
        f'{rule.name} at {site.path!r} reads {names} of a call around it (outer=), and this model '
        'maps over its parameters, so that they are computed before it is called'
      )


def _check_attention(rules: list[tuple[Rule, Site]]) -> None:
  """Raises a ValueError if a rule needs attention that is out of reach."""
  for rule, site in rules:
    if isinstance(rule, Call) and rule.requires == 'attention':
      why = refusal(rule, site)
      if why is not None:
        raise ValueError(why)


def _check_entries(tuned: Tuned) -> None:
  """Raises a ValueError if a rule names entries of theta that it does not have."""
  thetas: dict[Rule, list] = {}
  for rule, site in tuned.rules:
    entries = tuned.read_shapes.get(rule.name, {}).get(site.path, {})
    thetas.setdefault(rule, []).append(entries)
  if tuned.generators:
    jax.eval_shape(tuned.expand, tuned.shapes)
  for name, generator in tuned.generators.items():
    trees = list(tuned.shapes[name].values())
    unused = unused_name(generator.fixed, trees)
    if unused is not None:
      raise ValueError(
        f'{name}: fixed={unused!r} of generated names no entry of its smaller tree; there are '
        f'{_entries_of(trees)}'
      )
  for rule, trees in thetas.items():
    staged = [name for _, names in rule.stages for name in names]
    fields = {'fixed': rule.fixed, 'exact': rule.exact, 'stages': staged}
    if isinstance(rule, Weight):
      fields |= {'idle': rule.idle, 'restarts': [name for name, _ in rule.restarts]}
    for field, names in fields.items():
      name = unused_name(names, trees)
      if name is not None:
        raise ValueError(
          f'{rule.name}: {field}={name!r} names no entry of its theta; there are '
          f'{_entries_of(trees)}'
        )


def _entries_of(trees: list) -> str:
  """The paths of the entries of some trees, for errors."""
  return ', '.join(dict.fromkeys(path for tree in trees for path in leaf_paths(tree))) or 'none'


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
