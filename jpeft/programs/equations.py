"""Programs as JAX traces them, one equation at a time."""

from collections.abc import Callable
from typing import Any

from jax.extend import core as jex

_CALLS = ('jit', 'pjit', 'closed_call', 'core_call')


def variables(names) -> list:
  """Those of an equation's inputs or a program's outputs that are no literals."""
  return [v for v in names if not isinstance(v, jex.Literal)]


def reader(env: dict) -> Callable[[Any], Any]:
  """variable or literal -> its value, of env."""
  return lambda v: v.val if isinstance(v, jex.Literal) else env[v]


def inside(eqn):
  """The closed program of an equation that only calls one, or None."""
  return (
    (eqn.params.get('jaxpr') or eqn.params['call_jaxpr']) if eqn.primitive.name in _CALLS else None
  )


def evaluated(eqn, read) -> list:
  """What an equation gives, of read(variable)."""
  operands = list(dict.fromkeys(variables(eqn.invars)))
  info = jex.DebugInfo('equation', eqn.primitive.name, None, None)
  alone = jex.Jaxpr((), operands, eqn.outvars, [eqn], eqn.effects, info)
  return jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*map(read, operands))


def hoisted(closed) -> tuple[Any, list]:
  """(a jaxpr whose first inputs are the constants of a closed one, the constants)."""
  jaxpr = closed.jaxpr
  return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]), list(closed.consts)
