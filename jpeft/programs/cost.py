"""The FLOPs of a traced program, with every round of its loops."""

import math
from typing import NamedTuple

import jax
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr


class Flops(NamedTuple):
  """FLOPs of the matrix products and convolutions of a program, two for each multiply-add.

  Attributes:
    all: with the rounds of its loops.
    once: with the body of each loop counted once, as XLA counts.
  """

  all: float
  once: float


def flops(traced: jax.stages.Traced) -> Flops:
  """Counts a traced program, without what no output needs; nothing is compiled.

  A branch counts as its most expensive arm; a `while` loop, whose rounds are not known, as one
  round.
  """
  jaxpr = traced.jaxpr.jaxpr
  return _count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def uncounted(traced: jax.stages.Traced, devices: int = 1) -> float:
  """The FLOPs that XLA's cost analysis leaves out: it counts the body of a loop once."""
  found = flops(traced)
  return (found.all - found.once) / devices


def _count(jaxpr) -> Flops:
  all_rounds = 0.0
  once = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in PRODUCTS:
      count = PRODUCTS[name](eqn)
      found = [Flops(count, count)]
    else:
      found = [_count(inner) for inner in programs_of(eqn.params)]
    if name == 'cond' and found:
      found = [max(found)]
    rounds = 1
    if name == 'scan':
      rounds = eqn.params['length']
    devices = 1
    if name == 'shard_map':  # its program is what one device does
      devices = _devices(eqn.params)
    all_rounds += devices * rounds * sum(part.all for part in found)
    once += devices * sum(part.once for part in found)
  return Flops(all_rounds, once)


def _devices(params: dict) -> int:
  """How many devices run the program of a shard_map."""
  axes = params.get('newly_manual_axes', params.get('manual_axes'))  # as JAX's version calls them
  return math.prod(params['mesh'].shape[axis] for axis in axes)


def programs_of(params: dict) -> list:
  """The jaxprs among the parameters of an equation."""
  found = []
  for param in params.values():
    values = param if isinstance(param, (tuple, list)) else (param,)
    for value in values:
      if isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr)):
        found.append(getattr(value, 'jaxpr', value))
  return found


def _dot(eqn) -> float:
  contracted, _ = eqn.params['dimension_numbers'][0]
  summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed


def _conv(eqn) -> float:
  kernel = eqn.invars[1].aval.shape
  # rhs_spec: the axes of output features, input features, then space.
  _, features, *space = eqn.params['dimension_numbers'].rhs_spec
  window = math.prod(kernel[i] for i in space)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * kernel[features] * window


PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _conv}
