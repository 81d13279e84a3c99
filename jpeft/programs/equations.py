"""The equations of traced programs, evaluated one at a time."""

from collections.abc import Callable
from typing import Any

from jax.extend import core as jex

_CALLS = ('jit', 'pjit', 'closed_call', 'core_call')


def variables(atoms) -> list:
  """Those of an equation's inputs or a program's outputs that are no literals."""
  return [v for v in atoms if not isinstance(v, jex.Literal)]


def reader(values: dict) -> Callable[[Any], Any]:
  """A function from a variable, or a literal, to its value."""

  def read(variable):
    if isinstance(variable, jex.Literal):
      return variable.val
    return values[variable]

  return read


def inside(eqn):
  """The closed program of an equation that does nothing but call it, or None."""
  if eqn.primitive.name not in _CALLS:
    return None
  return eqn.params.get('jaxpr') or eqn.params['call_jaxpr']


def evaluated(eqn, read) -> list:
  """The outputs of an equation.

  Args:
    eqn: of a traced program.
    read: variable -> value.
  """
  operands = list(dict.fromkeys(variables(eqn.invars)))
  info = jex.DebugInfo('equation', eqn.primitive.name, None, None)
  alone = jex.Jaxpr((), operands, eqn.outvars, [eqn], eqn.effects, info)
  return jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*map(read, operands))


def hoisted(closed) -> tuple[Any, list]:
  """(a jaxpr whose first inputs are the constants of a closed one, the constants)."""
  jaxpr = closed.jaxpr
  invars = [*jaxpr.constvars, *jaxpr.invars]
  return jaxpr.replace(constvars=[], invars=invars), list(closed.consts)
