"""What a compiled program costs: bytes on a device, and FLOPs with every round of every loop."""

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
  total, once = 0.0, 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in _PRODUCTS:
      found = [Flops(*[_PRODUCTS[name](eqn)] * 2)]
    else:
      found = [_count(sub) for sub in _subs(eqn.params)]
      if name == 'cond' and found:
        found = [max(found)]
    rounds = eqn.params['length'] if name == 'scan' else 1
    total += rounds * sum(f.all for f in found)
    once += sum(f.once for f in found)
  return Flops(total, once)


def _subs(params: dict) -> list:
  """The jaxprs among the parameters of an equation."""
  values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
  return [getattr(v, 'jaxpr', v) for v in values if isinstance(v, (jex.Jaxpr, jex.ClosedJaxpr))]


def _dot(eqn) -> float:
  left, _ = eqn.params['dimension_numbers'][0]
  inner = math.prod(eqn.invars[0].aval.shape[i] for i in left)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * inner


def _conv(eqn) -> float:
  kernel, spec = eqn.invars[1].aval.shape, eqn.params['dimension_numbers'].rhs_spec
  window = math.prod(kernel[i] for i in spec[2:])  # rhs_spec: out features, in features, then space
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * kernel[spec[1]] * window


_PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _conv}
