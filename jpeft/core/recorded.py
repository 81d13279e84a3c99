"""What rules recorded in a call of the model, and what becomes of it outside of the call.

The records are {path: {kind: {rule: {name: array}}}}; arrays of a stack have its axes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .paths import AUX, WRITTEN, natural
from .sites import Site

# {(name of a rule, path): its site, with the layers of a stack in which it acts}.
SitesOfTheta = Mapping[tuple[str, str], Site]


def beside_output(
  records: Mapping[str, Any], sites: SitesOfTheta, penalties: Mapping[str, list]
) -> dict[str, Any]:
  """{name: array [layers, ...]} of `call.aux`, and under 'written' what `call.write` wrote.

  Args:
    records: of one call of the model.
    sites: of all rules.
    penalties: {name: [numbers of layers]} of rules.

  Raises:
    ValueError: layers gave arrays of unlike shapes under one name.
  """
  values = {name: list(layers) for name, layers in penalties.items()}
  written: dict[str, dict] = {}
  for path in sorted(records, key=natural):
    for rule, by_name in records[path].get(AUX, {}).items():
      for name, x in by_name.items():
        values.setdefault(name, []).append(_layers(sites[rule, path], x))
    for rule, entries in records[path].get(WRITTEN, {}).items():
      written.setdefault(rule, {})[path] = jax.tree.map(_chosen(sites[rule, path]), entries)
  found: dict[str, Any] = {}
  for name, layers in values.items():
    shapes = sorted({x.shape[1:] for x in layers})
    if len(shapes) > 1:
      raise ValueError(f'aux {name!r} has layers of the shapes {shapes}, which cannot be stacked')
    found[name] = layers[0] if len(layers) == 1 else jnp.concatenate(layers)
  if written:
    found[WRITTEN] = written
  return found


def write_back(theta: Mapping[str, Any], aux: Mapping[str, Any]) -> dict[str, Any]:
  """theta with the state that rules wrote in a call of `apply(..., aux=True)`."""
  theta = {name: dict(sites) for name, sites in theta.items()}
  for name, sites in aux.get(WRITTEN, {}).items():
    for path, entries in sites.items():
      theta[name][path] = {**theta[name][path], **entries}
  return theta


def records_for(name: str, records: Mapping[str, Any], sites: SitesOfTheta) -> dict[str, Any]:
  """The records as rules called `name` read them: of a stack those of the layers they act in."""
  found = dict(records)
  for (rule, path), site in sites.items():
    if rule != name or site.chosen is None or path not in records:
      continue
    kinds = {}
    for kind, by_rule in records[path].items():
      kinds[kind] = {**by_rule}
      if name in by_rule:
        kinds[kind][name] = jax.tree.map(_chosen(site), by_rule[name])
    found[path] = kinds
  return found


def _chosen(site: Site) -> Callable[[jax.Array], jax.Array]:
  """A function that takes the chosen layers of a recorded array, the stack first."""
  return lambda x: site.choose(site.stack_first(x))


def _layers(site: Site, x: jax.Array) -> jax.Array:
  """What a rule recorded at a site, [layers, ...]."""
  if not site.axes:
    return x[None]
  chosen = _chosen(site)(x)
  return chosen.reshape(-1, *chosen.shape[len(site.theta_lengths) :])
