"""Known activations in a program, found by what they compute rather than by their name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jpeft.programs import inside, reader, variables

from .codes import bits_of
from .derivatives import FUNCTIONS, Table, table

_ELEMENTWISE = {
  'add',
  'sub',
  'mul',
  'div',
  'neg',
  'exp',
  'exp2',
  'log',
  'log1p',
  'expm1',
  'tanh',
  'logistic',
  'erf',
  'erfc',
  'max',
  'min',
  'pow',
  'integer_pow',
  'square',
  'sqrt',
  'rsqrt',
  'convert_element_type',
  'copy',
  'select_n',
  'gt',
  'lt',
  'ge',
  'le',
  'eq',
  'abs',
  'sign',
  'custom_jvp_call',
  'broadcast_in_dim',
}
_GRID = np.linspace(-4, 4, 65)


@dataclasses.dataclass(frozen=True)
class Activation:
  """A variable of a program that is a known function of another one.

  Attributes:
    source: the variable that the function reads.
    table: of the function's derivative.
  """

  source: jex.Var
  table: Table


def is_float(variable) -> bool:
  return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def find_activations(
  jaxpr, consumers: dict, finished: set, active: set, bits: int
) -> dict[jex.Var, Activation]:
  """{output: activation} of the elementwise functions of one variable that have a table.

  Args:
    jaxpr: without inner calls.
    consumers: {variable: the equations that read it}.
    finished: the outputs of the program.
    active: variables that do not depend on weights alone.
    bits: of the codes; a table must have as many, or be exact with one.
  """
  roots, sources = _chains(jaxpr, active)
  found = {}
  for out, root in roots.items():
    if out.aval.dtype != root.aval.dtype:
      continue
    readers = consumers.get(out, ())
    ends_here = out in finished or any(roots.get(e.outvars[0]) is not root for e in readers)
    if not ends_here:
      continue
    name = _recognized(_in_order(jaxpr, sources[out]), root, out)
    if name is not None and bits_of(table(name)) in (1, bits):
      found[out] = Activation(root, table(name))
  return found


def _chains(jaxpr, active: set) -> tuple[dict, dict]:
  """({variable: the one variable it is an elementwise function of}, {variable: by what equations}).

  A function may pass through several equations, whose results all have the same root.
  """
  roots = {}
  sources = {}
  for eqn in jaxpr.eqns:
    operands = set(variables(eqn.invars))
    roots_here = {roots.get(v, v) for v in operands}
    if not _elementwise(eqn) or len(roots_here) != 1 or not operands <= active:
      continue
    (root,) = roots_here
    out = eqn.outvars[0]
    if root.aval.shape == out.aval.shape and root.aval.shape and is_float(root):
      roots[out] = root
      before = [e for v in operands for e in sources.get(v, ())]
      sources[out] = [*dict.fromkeys(before), eqn]
  return roots, sources


def _inner_program(eqn):
  """The closed program that an equation calls, or None."""
  return eqn.params.get('call_jaxpr') or eqn.params.get('jaxpr')


def _elementwise(eqn) -> bool:
  inner = _inner_program(eqn)
  if inner is None:
    return eqn.primitive.name in _ELEMENTWISE and len(eqn.outvars) == 1
  if eqn.primitive.name != 'custom_jvp_call' and not inside(eqn):
    return False
  return all(_elementwise(inner_eqn) for inner_eqn in inner.jaxpr.eqns)


def _in_order(jaxpr, eqns) -> list:
  chosen = {id(eqn) for eqn in eqns}
  return [eqn for eqn in jaxpr.eqns if id(eqn) in chosen]


def _recognized(eqns, source, out) -> str | None:
  """The name of the function that the equations compute, by its values on a grid."""
  tolerance = 3e-2
  if source.aval.dtype.itemsize >= 4:
    tolerance = 2e-3
  with jax.ensure_compile_time_eval():
    values = _on_grid(eqns, {source: jnp.asarray(_GRID, source.aval.dtype)})[out]
    if jnp.shape(values) != _GRID.shape:
      return None
    values = np.asarray(values, np.float64)
  errors = {name: np.abs(smooth.f(_GRID) - values).max() for name, smooth in FUNCTIONS.items()}
  best = min(errors, key=errors.get)
  # Errors are NaN where the equations have no value on the whole grid: then this is False.
  if errors[best] <= tolerance:
    return best
  return None


def _on_grid(eqns, values: dict) -> dict:
  """Evaluates elementwise equations on a grid, in place of the shapes they were traced for."""
  read = reader(values)
  for eqn in eqns:
    operands = [read(v) for v in eqn.invars]
    inner = _inner_program(eqn)
    if inner is not None:
      inner_values = dict(zip(inner.jaxpr.invars, operands, strict=True))
      _on_grid(inner.jaxpr.eqns, inner_values)
      (result,) = inner.jaxpr.outvars
      values[eqn.outvars[0]] = reader(inner_values)(result)
    elif eqn.primitive.name == 'broadcast_in_dim':
      values[eqn.outvars[0]] = operands[0]
    else:
      values[eqn.outvars[0]] = eqn.primitive.bind(*jnp.broadcast_arrays(*operands), **eqn.params)
  return values
