"""The forward and the backward pass of a program whose residuals are stored in few bits."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jpeft.programs import evaluated, inside, reader, variables

from .activations import Activation
from .choose import Choice
from .codes import bits_of, derivative_codes, look_up, pack, unpack
from .derivatives import Table
from .ops import tied


def evaluate(jaxpr, inputs, replace: dict, consts=()) -> list:
  """Runs a jaxpr.

  Args:
    jaxpr: the program.
    inputs: its arguments.
    replace: {variable: (value, read) -> value}: what takes the place of an equation's output.
    consts: the values of its constants.
  """
  names = [*jaxpr.constvars, *jaxpr.invars]
  values = dict(zip(names, [*consts, *inputs], strict=True))
  read = reader(values)
  for eqn in jaxpr.eqns:
    inner = inside(eqn)
    if inner:
      outs = evaluate(inner.jaxpr, [read(v) for v in eqn.invars], {}, inner.consts)
    else:
      outs = evaluated(eqn, read)
    values |= zip(eqn.outvars, outs, strict=True)
    for variable in eqn.outvars:
      if variable in replace:
        values[variable] = replace[variable](values[variable], read)
  return [read(v) for v in jaxpr.outvars]


def stored(jaxpr, n_weights: int, choice: Choice, prevent_cse: bool) -> Callable:
  """The function of a jaxpr, with a backward pass from few bits.

  Args:
    jaxpr: without inner calls; its first inputs are weights.
    n_weights: how many.
    choice: what may be stored.
    prevent_cse: see `compressed`.
  """
  program = _Program(jaxpr, n_weights, choice, prevent_cse)

  @jax.custom_vjp
  def run(*inputs):
    return evaluate(jaxpr, inputs, {})

  run.defvjp(program.forward, program.backward, symbolic_zeros=True)
  return run


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
  """What the forward pass stored, for the backward pass; static.

  Attributes:
    choice: what may be stored.
    moved: inputs that have a gradient, by index.
    values: variables that are stored as values.
    codes: variables of which a code of the derivative is stored.
    inputs: inputs that are stored, by index.
  """

  choice: Choice
  moved: tuple[int, ...]
  values: tuple[jex.Var, ...]
  codes: tuple[jex.Var, ...]
  inputs: tuple[int, ...]


class _Program:
  """The passes of a program, given what of it may be stored."""

  def __init__(self, jaxpr, n_weights: int, choice: Choice, prevent_cse: bool):
    self.prevent_cse = prevent_cse
    self.jaxpr = jaxpr
    self.n_weights = n_weights
    self.choice = choice
    self.plan = functools.cache(self._planned)

  def forward(self, *inputs):
    moved = tuple(i for i, x in enumerate(inputs) if x.perturbed and _is_inexact(x.value))
    inputs = [x.value for x in inputs]
    plan = self.plan(moved)
    values = {}
    codes = {}
    activations = {}  # by what they read
    for out in plan.codes:
      activations.setdefault(plan.choice.codes[out].source, []).append(out)

    def caught(variable, value):
      """A value, when what is stored of it is packed."""
      if variable in plan.values:
        packed = plan.choice.values[variable].pack(value)
        value, values[variable] = self._in_order(packed, value)
      for out in activations.get(variable, ()):
        code = _encoded(value, plan.choice.codes[out].table)
        value, codes[out] = self._in_order(code, value)
      return value

    def catch(variable):
      return lambda value, read: caught(variable, value)

    given = list(inputs)
    stored_inputs = []
    for i in plan.inputs:
      kept = inputs[i]
      if self._is_packed(i, moved):
        given[i], kept = self._in_order(self.choice.inputs[i].pack(kept), kept)
      stored_inputs.append(kept)
    given = [caught(v, x) for v, x in zip(self.jaxpr.invars, given, strict=True)]
    outs = evaluate(self.jaxpr, given, {v: catch(v) for v in (*plan.values, *activations)})
    values = [values[v] for v in plan.values]
    codes = [codes[v] for v in plan.codes]
    return outs, (plan, values, codes, stored_inputs)

  def _in_order(self, packed, value):
    """(value, packed), of which the value is read on only when it is packed.

    Packed later, it would have to wait in full. One barrier at the end of a block would do as well,
    but none of the next block's sums over its input could then be made within the product that the
    input comes from.
    """
    if not self.prevent_cse or packed is value:
      return value, packed
    return jax.lax.optimization_barrier((value, packed))

  def backward(self, residuals, cotangents):
    plan, *residuals = residuals
    outs = zip(self.jaxpr.outvars, cotangents, strict=True)
    cotangents = [_dense(out.aval, g) for out, g in outs if _is_inexact(out.aval)]
    if self.prevent_cse:
      # Tied to the cotangent: in unrolled layers XLA would otherwise undo the saving.
      residuals, cotangents = tied(residuals, cotangents)
    packed_values, codes, stored_inputs = residuals
    values = {}
    for variable, packed in zip(plan.values, packed_values, strict=True):
      values[variable] = plan.choice.values[variable].unpack(packed)
    codes = dict(zip(plan.codes, codes, strict=True))
    inputs = [None] * len(self.jaxpr.invars)
    for i, x in zip(plan.inputs, stored_inputs, strict=True):
      inputs[i] = x
      if self._is_packed(i, plan.moved):
        inputs[i] = self.choice.inputs[i].unpack(x)
    for i, variable in enumerate(self.jaxpr.invars):
      if inputs[i] is None:  # no gradient reads it
        inputs[i] = _zeros(variable.aval)
    gradients = self._gradients(plan.choice, plan.moved, values, codes, inputs, cotangents)
    if self.prevent_cse:
      # All before any: a gradient of a weight that waits would keep alive what it is computed from.
      gradients = jax.lax.optimization_barrier(gradients)
    by_input = dict(zip(plan.moved, gradients, strict=True))
    return tuple(by_input.get(i) for i in range(len(self.jaxpr.invars)))

  def _is_packed(self, i: int, moved: tuple[int, ...]) -> bool:
    """Whether an input is stored in few bits: no weight, and none without a gradient."""
    return i >= self.n_weights and i in moved

  def _gradients(self, choice: Choice, moved, values: dict, codes: dict, inputs: list, cotangents):
    """The gradients of inputs `moved`.

    They must not depend on a value or a code that is missing from `values` and `codes`: zeros stand
    in for it.
    """

    def stand_in(variable):
      def replace(computed, read):
        kept = values.get(variable)
        activation = choice.codes.get(variable)
        if activation is not None:
          code = codes.get(variable)
          if code is None:
            code = _zeros(_code_shape(activation))
          if kept is None:
            kept = _zeros(variable.aval)
          return _with_slope(read(activation.source), kept, _slope(code, variable, activation))
        if kept is None:
          return computed
        return _with_value(computed, kept)

      return replace

    replacements = {v: stand_in(v) for v in choice.values}

    def outputs(*arrays):
      filled = list(inputs)
      for i, x in zip(moved, arrays, strict=True):
        filled[i] = x
      outs = zip(self.jaxpr.outvars, evaluate(self.jaxpr, filled, replacements), strict=True)
      return [out for variable, out in outs if _is_inexact(variable.aval)]

    _, vjp = jax.vjp(outputs, *(inputs[i] for i in moved))
    return vjp(cotangents)

  def _planned(self, moved: tuple[int, ...]) -> _Plan:
    """What is stored for the gradients of inputs `moved`.

    Of an activation whose derivative and output are both needed the input is stored, from which
    both follow: half as much, and a table of the derivative is not searched. A derivative of one
    bit is exact, and small beside the output.
    """
    plan = self._plan(self.choice, moved)
    both = set(plan.values) & set(plan.codes)
    twice = {v for v in both if bits_of(self.choice.codes[v].table) > 1}
    if not twice:
      return plan
    return self._plan(self.choice.without(twice), moved)

  def _plan(self, choice: Choice, moved: tuple[int, ...]) -> _Plan:
    """What a live equation of the backward program reads, of all that may be stored."""
    all_values = list(choice.values)
    all_codes = list(choice.codes)
    all_inputs = range(len(self.jaxpr.invars))

    def gradients(values, codes, inputs, cotangents):
      values = dict(zip(all_values, values, strict=True))
      codes = dict(zip(all_codes, codes, strict=True))
      return self._gradients(choice, moved, values, codes, inputs, cotangents)

    shapes = (
      [v.aval for v in all_values],
      [_code_shape(choice.codes[v]) for v in all_codes],
      [v.aval for v in self.jaxpr.invars],
      [v.aval for v in self.jaxpr.outvars if _is_inexact(v.aval)],
    )
    shapes = jax.tree.map(lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype), shapes)
    # In the order of the arguments of `gradients`.
    used = iter(_used_inputs(jax.make_jaxpr(gradients)(*shapes).jaxpr))
    values = tuple(variable for variable in all_values if next(used))
    codes = tuple(variable for variable in all_codes if next(used))
    inputs = tuple(i for i in all_inputs if next(used))
    return _Plan(choice, moved, values, codes, inputs)


def _used_inputs(jaxpr) -> list[bool]:
  """Whether each input of a program reaches an output."""
  live = set(variables(jaxpr.outvars))
  for eqn in reversed(jaxpr.eqns):
    if live & set(eqn.outvars):
      live.update(variables(eqn.invars))
  return [v in live for v in jaxpr.invars]


@jax.custom_jvp
def _with_value(computed, kept):
  """`kept`, with the derivative of `computed`, which therefore need not be computed."""
  return kept


@_with_value.defjvp
def _(primals, tangents):
  return primals[1], tangents[0]


@jax.custom_jvp
def _with_slope(x, y, slope):
  """y, whose derivative by x is slope."""
  return y


@_with_slope.defjvp
def _(primals, tangents):
  _, y, slope = primals
  return y, (slope * tangents[0].astype(slope.dtype)).astype(y.dtype)


def _encoded(x, table: Table):
  """The packed codes of the derivative of an activation of x."""
  return pack(derivative_codes(x, table), bits_of(table))


def _slope(code, variable, activation: Activation):
  """The derivative of an activation from its packed codes."""
  codes = unpack(code, variable.aval.shape, bits_of(activation.table))
  return look_up(codes, activation.table.levels)


def _code_shape(activation: Activation) -> jax.ShapeDtypeStruct:
  shape = activation.source.aval.shape
  return jax.eval_shape(lambda: pack(jnp.zeros(shape, jnp.uint8), bits_of(activation.table)))


def _is_inexact(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _zeros(aval):
  return jnp.zeros(aval.shape, aval.dtype)


def _dense(aval, cotangent):
  """A cotangent, with zeros in place of a symbolic zero."""
  if isinstance(cotangent, SymbolicZero):
    return _zeros(aval)
  return cotangent
