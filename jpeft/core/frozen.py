"""A trained method as a part of another: its theta is state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .generator import Generator
from .rules import Method, Rule, Weight
from .sites import Site

# A schedule has run its course, and the equality of factories does not see theta.
_AT_REST: dict[str, Any] = {'update': None, 'edit': None, 'stages': (), 'origin': None}


def frozen(method: Method, theta: Mapping[str, Any]) -> Method:
  """A method that starts as a trained theta and is not trained further.

  Chained with others it is the base that they learn on: `chain(frozen(lora(8), theta),
  pfeiffer(64))`. Its theta is part of the new one, so that it is stored, merged and moved with it.

  Args:
    method: as it was trained.
    theta: {method name: {site path: arrays}}; further names are left out.

  Raises:
    ValueError: at `attach`, theta has no entry for a site of the method, or one of other shapes.
  """
  return Method((pattern, _frozen(rule, theta)) for pattern, rule in method)


def _frozen(rule: Rule, theta: Mapping[str, Any]) -> Rule:
  sites = theta.get(rule.name, {})

  def init(key, site: Site, arrays):
    own = rule.init(key, site, arrays)
    if not jax.tree.leaves(own):
      return own
    if site.path not in sites:
      some = ', '.join(list(sites)[:3]) or 'none'
      raise ValueError(
        f'frozen: theta has no entry {rule.name!r} for {site.path!r}; its sites are {some}, ...'
      )
    given = {name: sites[site.path][name] for name in own if name in sites[site.path]}
    layer = jax.tree.map(lambda x: site.of_layer(x, arrays.number), given)
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), own)
    found = jax.tree.map(lambda x: (x.shape, x.dtype), layer)
    if found != wanted:
      raise ValueError(
        f'frozen: theta has other arrays for {rule.name!r} at {site.path!r} than the method: was '
        'it trained with other hyperparameters?'
      )
    return layer

  if isinstance(rule, Weight):
    rule = dataclasses.replace(rule, penalty=None)
  generator = rule.generator
  if generator is not None:
    kept = _frozen_generator(rule.name, generator, sites)
    return dataclasses.replace(rule, generator=kept, **_AT_REST)
  return dataclasses.replace(rule, init=init, fixed=('*',), **_AT_REST)


def _frozen_generator(name: str, generator: Generator, given: Mapping[str, Any]) -> Generator:
  """A generator whose smaller tree is a trained one."""

  def init(key, places):
    wanted = jax.eval_shape(lambda key: generator.init(key, places), key)
    kept = jax.tree.map(jnp.asarray, dict(given))
    if jax.tree.map(jnp.shape, kept) != jax.tree.map(jnp.shape, wanted):
      raise ValueError(
        f'frozen: theta has other arrays for the generated {name!r} than the method: was it '
        'trained with other hyperparameters, or on another model?'
      )
    return kept

  return Generator(init, generator.expand, fixed=('*',))
