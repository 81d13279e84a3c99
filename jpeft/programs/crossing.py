"""What a backward pass crosses: which frozen products lie between theta and the output."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from .cost import PRODUCTS, programs_of


class Crossing(NamedTuple):
  """What was found of a forward pass.

  Attributes:
    share: of the FLOPs of products with frozen arrays, those that a cotangent crosses on its way to
      theta: 0 for a side network behind `stop_gradient`, nearly 1 for LoRA in all layers.
    unused: the numbers of the leaves of theta that reach no output.
  """

  share: float
  unused: tuple[int, ...]


class _Mark(NamedTuple):
  """What is known of a value.

  Attributes:
    leaves: bits of the leaves of theta that it depends on, with a gradient or without.
    cotangents: bits of those that a cotangent of the value reaches.
    frozen: whether it is made of frozen arrays and constants alone.
  """

  leaves: int = 0
  cotangents: int = 0
  frozen: bool = True


class _Sums:
  """FLOPs of products of an activation with a frozen array: all, and those that are crossed."""

  def __init__(self):
    self.all = 0.0
    self.crossed = 0.0


def crossing(fn: Callable[..., Any], theta, backbone, *rest) -> Crossing:
  """Follows theta through fn(theta, backbone, *rest); nothing is computed.

  Args:
    fn: a forward pass.
    theta: what is trained; shapes will do, here and below.
    backbone: what is frozen.
    *rest: the other inputs.
  """
  jaxpr = jax.make_jaxpr(fn)(theta, backbone, *rest).jaxpr
  count = len(jax.tree.leaves(theta))
  frozen = len(jax.tree.leaves(backbone))
  marks = [_Mark(1 << i, 1 << i, False) for i in range(count)]
  marks += [_Mark()] * frozen
  marks += [_Mark(frozen=False)] * (len(jaxpr.invars) - count - frozen)
  sums = _Sums()
  outs = _walk(jaxpr, marks, 1, sums)
  reached = 0
  for mark in outs:
    reached |= mark.leaves
  unused = tuple(i for i in range(count) if not reached >> i & 1)
  return Crossing(sums.crossed / sums.all if sums.all else 0.0, unused)


def _walk(jaxpr, marks: Sequence[_Mark], times: float, sums: _Sums) -> list[_Mark]:
  """The marks of the outputs of a jaxpr that runs `times` times."""
  known = dict(zip(jaxpr.invars, marks, strict=True))

  def mark_of(variable) -> _Mark:
    if isinstance(variable, jex.Literal):
      return _Mark()
    return known.get(variable, _Mark())  # else a constant that the jaxpr closes over

  for eqn in jaxpr.eqns:
    operands = [mark_of(variable) for variable in eqn.invars]
    known |= zip(eqn.outvars, _outputs(eqn, operands, times, sums), strict=True)
  return [mark_of(variable) for variable in jaxpr.outvars]


def _outputs(eqn, operands: list[_Mark], times: float, sums: _Sums) -> list[_Mark]:
  name = eqn.primitive.name
  if name == 'scan':
    return _scan(eqn, operands, times, sums)
  if name == 'while':
    return _while(eqn, operands, times, sums)
  inner = programs_of(eqn.params)
  if inner and name == 'cond':
    branches = [_walk(sub, operands[1:], times / len(inner), sums) for sub in inner]
    return [_joined([*marks, operands[0]]) for marks in zip(*branches, strict=True)]
  if len(inner) == 1 and len(inner[0].invars) == len(operands):  # jit, remat, custom_vjp
    return _walk(inner[0], operands, times, sums)
  if name in PRODUCTS:
    _product(eqn, operands, times, sums)
  joined = _joined(operands)
  outs = []
  for variable in eqn.outvars:
    differentiable = jnp.issubdtype(variable.aval.dtype, jnp.inexact) and name != 'stop_gradient'
    outs.append(joined if differentiable else joined._replace(cotangents=0))
  return outs


def _joined(marks: Sequence[_Mark]) -> _Mark:
  """The mark of what is made of several values."""
  leaves = 0
  cotangents = 0
  for mark in marks:
    leaves |= mark.leaves
    cotangents |= mark.cotangents
  return _Mark(leaves, cotangents, all(mark.frozen for mark in marks))


def _product(eqn, operands: list[_Mark], times: float, sums: _Sums) -> None:
  """Counts a product, if one of its sides is frozen and the other an activation."""
  one, other = operands[:2]
  if one.frozen == other.frozen:
    return
  activation = other if one.frozen else one
  flops = times * PRODUCTS[eqn.primitive.name](eqn)
  sums.all += flops
  if activation.cotangents:
    sums.crossed += flops


def _scan(eqn, operands: list[_Mark], times: float, sums: _Sums) -> list[_Mark]:
  consts = eqn.params['num_consts']
  carried = eqn.params['num_carry']
  body = eqn.params['jaxpr'].jaxpr
  constants = operands[:consts]
  carry = operands[consts : consts + carried]
  slices = operands[consts + carried :]
  carry = _settled(body, constants, carry, slices)
  return _walk(body, [*constants, *carry, *slices], times * eqn.params['length'], sums)


def _settled(body, constants, carry: list[_Mark], slices) -> list[_Mark]:
  """The marks of what a loop carries, once another round adds nothing to them."""
  while True:
    outs = _walk(body, [*constants, *carry, *slices], 1, _Sums())
    grown = [_joined(pair) for pair in zip(carry, outs[: len(carry)], strict=True)]
    if grown == carry:
      return carry
    carry = grown


def _while(eqn, operands: list[_Mark], times: float, sums: _Sums) -> list[_Mark]:
  of_condition = eqn.params['cond_nconsts']
  of_body = of_condition + eqn.params['body_nconsts']
  body = eqn.params['body_jaxpr'].jaxpr
  constants = operands[of_condition:of_body]
  carry = operands[of_body:]
  carry = _settled(body, constants, carry, [])
  # A loop of unknown length has no backward pass.
  outs = _walk(body, [*constants, *carry], times, sums)
  return [mark._replace(cotangents=0) for mark in outs]
