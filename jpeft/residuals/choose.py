"""Which values of a program may be stored for its backward pass, and how each is."""

import dataclasses
from typing import Any

import jax
from jax.extend import core as jex

from jpeft.programs import variables

from .activations import Activation, find_activations, is_float
from .codes import decode, encode

_PRODUCTS = {'dot_general', 'conv_general_dilated', 'ragged_dot_general'}
# Of a wide array, one number for many: cheap to store, and a pass over the array to compute again.
_REDUCTIONS = {'reduce_sum', 'reduce_max', 'reduce_min'}
# Programs of their own, or expensive to compute again: their outputs are stored.
_OPAQUE = {
  'scan',
  'while',
  'cond',
  'checkpoint',
  'remat2',
  'custom_vjp_call',
  'pallas_call',
  'shard_map',
  'sort',
  'top_k',
  'fft',
  'custom_lin',
  'ragged_dot',
  'reduce_window',
  'reduce_window_max',
  'reduce_window_sum',
}
_THROUGH = {
  'add',
  'sub',
  'neg',
  'copy',
  'convert_element_type',
  'mul',
  'div',
  'sharding_constraint',  # of a step on many devices, which stores what one device does
}
# An array this many times smaller than the widest input is stored as it is.
_SMALL = 8


@dataclasses.dataclass(frozen=True)
class Storage:
  """How a value is stored.

  Attributes:
    aval: its shape and dtype.
    bits: of codes in groups; None for the value as it is.
    once: whether it is unpacked once, before any of the products that read it. Fused into each of
      them, unpacking costs a TPU more than the pass that it saves.
  """

  aval: Any
  bits: int | None
  once: bool = False

  def pack(self, x):
    if self.bits is None:
      return x
    return encode(x, self.bits)

  def unpack(self, packed):
    if self.bits is None:
      return packed
    value = decode(packed, self.aval.shape, self.aval.dtype, self.bits)
    if self.once:
      value = jax.lax.optimization_barrier(value)
    return value


@dataclasses.dataclass(frozen=True)
class Choice:
  """What may be stored of a program.

  Attributes:
    values: {variable: how} of outputs of equations.
    codes: {variable: activation}: of these a code of the derivative is enough for gradients.
    inputs: {index of an input: how}, of those that are not weights.
  """

  values: dict[jex.Var, Storage]
  codes: dict[jex.Var, Activation]
  inputs: dict[int, Storage]

  def without(self, variables) -> 'Choice':
    """The same, in which some outputs of equations are computed again."""
    return Choice(
      values={v: how for v, how in self.values.items() if v not in variables},
      codes={v: activation for v, activation in self.codes.items() if v not in variables},
      inputs=self.inputs,
    )


def choose(jaxpr, n_weights: int, bits: int, operand_bits: int) -> Choice:
  """Everything that may be stored; what is, follows from the backward pass.

  Args:
    jaxpr: without inner calls; its first inputs are weights.
    n_weights: how many.
    bits: of values.
    operand_bits: of operands of products between activations.
  """
  inputs = jaxpr.invars[n_weights:]
  active = _active(jaxpr, inputs)
  consumers = _consumers(jaxpr)
  finished = set(variables(jaxpr.outvars))
  again = [eqn for eqn in jaxpr.eqns if _of_activations(eqn, active)]
  codes = find_activations(jaxpr, consumers, finished, active, bits)

  anchors = dict.fromkeys(codes)
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in _PRODUCTS | _OPAQUE and eqn not in again:
      outs = [v for v in eqn.outvars if v in active]
      anchors |= dict.fromkeys(_followed(v, consumers, finished) for v in outs)

  widest = _widest(inputs)
  anchors |= dict.fromkeys(_statistics(jaxpr, again, active, widest))
  operands = _sources(jaxpr, again, {*anchors, *jaxpr.invars})

  def storage(variable) -> Storage:
    if variable in operands:
      return dataclasses.replace(_storage(variable, widest, operand_bits), once=True)
    return _storage(variable, widest, bits)

  return Choice(
    values={v: storage(v) for v in anchors},
    codes=codes,
    inputs={i: storage(v) for i, v in enumerate(inputs, n_weights)},
  )


def choose_inputs(jaxpr, n_weights: int, bits: int) -> Choice:
  """The inputs alone: all else is computed again.

  Args:
    jaxpr: without inner calls; its first inputs are weights.
    n_weights: how many.
    bits: of values.
  """
  inputs = jaxpr.invars[n_weights:]
  widest = _widest(inputs)
  stored = {i: _storage(v, widest, bits) for i, v in enumerate(inputs, n_weights)}
  return Choice(values={}, codes={}, inputs=stored)


def _widest(inputs) -> int:
  """The size of the largest input."""
  return max((v.aval.size for v in inputs if is_float(v)), default=0)


def _storage(variable, widest: int, bits: int) -> Storage:
  """How a value is stored: as it is, if it is small beside the widest input."""
  if not is_float(variable) or _is_small(variable, widest):
    return Storage(variable.aval, None)
  return Storage(variable.aval, bits)


def _is_small(variable, widest: int) -> bool:
  return variable.aval.size * _SMALL <= widest


def _active(jaxpr, inputs) -> set:
  """The variables that depend on the inputs, not on weights alone."""
  active = set(inputs)
  for eqn in jaxpr.eqns:
    if any(v in active for v in variables(eqn.invars)):
      active.update(eqn.outvars)
  return active


def _consumers(jaxpr) -> dict:
  """{variable: the equations that read it}."""
  consumers = {}
  for eqn in jaxpr.eqns:
    for variable in set(variables(eqn.invars)):
      consumers.setdefault(variable, []).append(eqn)
  return consumers


def _of_activations(eqn, active: set) -> bool:
  """Whether an equation is a product of activations, which is computed again."""
  operands = variables(eqn.invars)
  return eqn.primitive.name in _PRODUCTS and len(operands) > 1 and set(operands) <= active


def _statistics(jaxpr, again: list, active: set, widest: int) -> list:
  """The small results of sums and maxima over wide arrays, such as those of a norm.

  Not of what follows from products that are computed again, such as the sums of a softmax: XLA
  would make these in a pass of their own, where it has them within a product.
  """
  found = []
  again = {v for eqn in again for v in eqn.outvars}
  for eqn in jaxpr.eqns:
    if again & set(variables(eqn.invars)) and eqn.primitive.name not in _PRODUCTS:
      again.update(eqn.outvars)
    elif eqn.primitive.name in _REDUCTIONS:
      (read,) = eqn.invars
      (out,) = eqn.outvars
      if out in active and is_float(out) and _is_small(out, widest) and not _is_small(read, widest):
        found.append(out)
  return found


def _followed(variable, consumers: dict, finished: set):
  """Where a value ends up through sums and scales that it alone enters.

  Stored there it serves as well, and often two values are stored as one.
  """
  while variable not in finished and len(consumers.get(variable, ())) == 1:
    (eqn,) = consumers[variable]
    if not _keeps_the_value(eqn, variable):
      break
    variable = eqn.outvars[0]
  return variable


def _keeps_the_value(eqn, variable) -> bool:
  """Whether an equation adds to or scales a variable, in no more bytes."""
  out = eqn.outvars[0]
  if eqn.primitive.name not in _THROUGH or out.aval.shape != variable.aval.shape:
    return False
  if eqn.primitive.name in ('mul', 'div'):
    others = [x for x in variables(eqn.invars) if x is not variable]
    if any(x.aval.shape for x in others):
      return False
  return is_float(out) and out.aval.dtype.itemsize <= variable.aval.dtype.itemsize


def _sources(jaxpr, eqns, stops: set) -> set:
  """The members of `stops` that `eqns` read, through equations that are computed again."""
  maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
  found = set()
  seen = set()
  todo = [v for eqn in eqns for v in variables(eqn.invars)]
  while todo:
    variable = todo.pop()
    if variable in stops:
      found.add(variable)
    elif variable not in seen and variable in maker:
      todo += variables(maker[variable].invars)
    seen.add(variable)
  return found
