"""What a rule makes of the stored arrays of its site, for `merge` and models without boxes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .blame import blame
from .boxes import Box, Reader, read
from .paths import join_path
from .rules import Call, Rule, Weight
from .sites import Site


def arrays_of(site: Site, flat: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays of the module of a site, as they are stored, of {'path/name': array}."""
  return {name: flat[join_path(site.owner, name)] for name in site.leaves}


def narrowed(site: Site, stored: Mapping[str, Any]) -> dict[str, Any]:
  """What a site has of one layer's arrays of its module."""
  return {name: site.narrow(name, stored[name]) for name in site.leaves}


def layer_by_layer(flat: Mapping[str, Any], site: Site, fn: Callable, *trees):
  """fn(arrays, *own) of each layer of a site in turn, so that one layer is in use at a time.

  Args:
    flat: {'path/name': array or box} of the whole model.
    site: where.
    fn: of the arrays of one layer, and of what each tree has of it.
    *trees: as theta, with the stack in front.
  """
  whole = arrays_of(site, flat)

  def one_layer(arrays, *own):
    return fn(Reader(narrowed(site, arrays)), *own)

  if not site.axes:
    return one_layer(whole, *trees)
  stacked = jax.tree.map(lambda x: site.choose(site.stack_first(x)), whole)
  stack = len(site.theta_lengths)
  layers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[stack:]), (stacked, *trees))
  found = jax.lax.map(lambda own: one_layer(*own), layers)
  return jax.tree.map(lambda x: x.reshape(*site.theta_lengths, *x.shape[1:]), found)


def changed(change: Callable, t, site: Site, arrays: Reader) -> dict[str, Any]:
  """{name: new array or box of the module} of what a rule makes of one layer's arrays.

  Args:
    change: (t, site, arrays) -> new arrays of the site, which may be a part of its module.
    t: theta of one layer.
    site: where.
    arrays: of the module.
  """
  if not site.part:
    return change(t, site, arrays)
  stored = {name: arrays.stored(name) for name in site.leaves}
  new = change(t, site, Reader(narrowed(site, stored)))
  return {name: site.widen(name, stored[name], x) for name, x in new.items()}


def merged(
  rule: Rule, site: Site, t, flat: Mapping[str, Any], outer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """{'path/name': new array or box} of what a rule replaces at a site.

  Args:
    rule: a Weight, or a Call that merges.
    site: where.
    t: its theta there.
    flat: {'path/name': array or box} of the whole model.
    outer: {name: scalar} that rules read of a call of the model (`Weight.outer`).

  Raises:
    ValueError: the rule reads a number that is not given.
  """
  change = rule.merge if isinstance(rule, Call) else rule.apply
  arrays = arrays_of(site, flat)
  if not arrays:
    return {}

  around = {}
  if isinstance(rule, Weight):
    around = {entry: _given(rule, site, entry, outer or {}) for entry in rule.outer}

  def one_layer(t, arrays):
    t = {**t, **around}
    with blame(rule, site, 'merge' if isinstance(rule, Call) else 'apply'):
      return changed(change, t, site, Reader(arrays))

  stacked = jax.tree.map(site.stack_first, arrays)
  chosen = jax.tree.map(site.choose, stacked)
  found = {}
  for name, new in site.per_layer(one_layer)(t, chosen).items():
    if site.chosen is not None:
      new = _with_chosen(site, stacked[name], new)
    new = jax.tree.map(site.stack_restore, new)
    if not isinstance(new, Box):
      new = new.astype(arrays[name].dtype)
    found[join_path(site.owner, name)] = new
  return found


def _given(rule: Weight, site: Site, entry: str, outer: Mapping[str, Any]) -> jax.Array:
  if entry not in outer:
    raise ValueError(
      f'{rule.name} at {site.path!r} reads {entry!r} of each call of the model: give one number '
      f'for all calls, merge(..., outer={{{entry!r}: ...}})'
    )
  value = jnp.asarray(outer[entry])
  if value.ndim:
    raise ValueError(
      f'{rule.name} at {site.path!r} reads {entry!r} of shape {value.shape}: one kernel serves all '
      'examples, so that it takes one number'
    )
  return value


def _with_chosen(site: Site, before, new):
  """All layers of an array or box, with new ones in the chosen layers."""
  if isinstance(new, Box):
    return jax.tree.map(site.replace_chosen, before, new)
  whole = before
  if isinstance(before, Box):
    each = read
    for _ in site.lengths:
      each = jax.vmap(each)
    whole = each(before)
  return site.replace_chosen(whole, new.astype(whole.dtype))
