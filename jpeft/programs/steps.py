"""A traced program as steps, any of which can be run without the others."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from .equations import evaluated, inside, reader, variables

# What a value depends on: bits, of which a value may have both.
_DATA, _THETA = 1, 2
_CHEAP = ('broadcast_in_dim', 'convert_element_type')


class _Step(NamedTuple):
  """An equation; every value of the program has a number, whatever call it lies in."""

  eqn: Any
  ins: list[int | jex.Literal]
  outs: list[int]


class Steps:
  """A program fn(theta, backbone, batch, *rest) as steps.

  Attributes:
    tree: the structure of the output.
    outs: its values, by number.
    crossing: {number: shape} of the values that depend on the batch alone and that steps which
      depend on theta or `rest` read.
  """

  def __init__(self, fn: Callable[..., Any], theta, backbone, batch, *rest):
    given = {'theta': theta, 'backbone': backbone, 'batch': batch, 'rest': rest}
    closed, out = jax.make_jaxpr(
      lambda given: fn(given['theta'], given['backbone'], given['batch'], *given['rest']),
      return_shape=True,
    )(given)
    self.tree = jax.tree.structure(out)
    self._steps: list[_Step] = []
    self._avals: dict[int, Any] = {}
    self._constants: dict[int, Any] = {}
    self._numbers = itertools.count()
    inputs = [self._new(v.aval) for v in closed.jaxpr.invars]
    self._inputs = jax.tree.unflatten(jax.tree.structure(given), inputs)
    self.outs = self._inline(closed, inputs)
    self.crossing = self._crossing()

  def run(self, wanted: Iterable, known: dict | None = None, **given) -> list:
    """The values `wanted`, by no more steps than it takes.

    Args:
      wanted: numbers or literals.
      known: {number: value} of what need not be computed.
      **given: the inputs by section: theta, backbone, batch, rest.
    """
    values = {**self._constants, **(known or {})}
    for section, tree in given.items():
      values |= zip(jax.tree.leaves(self._inputs[section]), jax.tree.leaves(tree), strict=True)
    wanted = list(wanted)
    read = reader(values)
    for step in self._needed(wanted, values):
      operands = {}
      for number, variable in zip(step.ins, step.eqn.invars, strict=True):
        if not isinstance(variable, jex.Literal):
          operands[variable] = read(number)
      values |= zip(step.outs, evaluated(step.eqn, operands.__getitem__), strict=True)
    return [read(number) for number in wanted]

  def _needed(self, wanted: list, values: dict) -> list[_Step]:
    """The steps that lead from the values to what is wanted, in order."""
    missing = set(variables(wanted)) - set(values)
    steps = []
    for step in reversed(self._steps):
      if missing & set(step.outs):
        steps.append(step)
        missing |= set(variables(step.ins)) - set(values)
    return steps[::-1]

  def _new(self, aval) -> int:
    number = next(self._numbers)
    self._avals[number] = aval
    return number

  def _inline(self, closed, ins: list) -> list:
    """Appends the steps of a jaxpr, and of those it calls: a jit may reach into both halves."""
    jaxpr = closed.jaxpr
    numbers = dict(zip(jaxpr.invars, ins, strict=True))
    for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
      numbers[variable] = self._new(variable.aval)
      self._constants[numbers[variable]] = value

    def number_of(variable):
      if isinstance(variable, jex.Literal):
        return variable
      return numbers[variable]

    for eqn in jaxpr.eqns:
      args = [number_of(v) for v in eqn.invars]
      inner = inside(eqn)
      if inner:
        outs = self._inline(inner, args)
      else:
        outs = [self._new(v.aval) for v in eqn.outvars]
        self._steps.append(_Step(eqn, args, outs))
      numbers |= zip(eqn.outvars, outs, strict=True)
    return [number_of(v) for v in jaxpr.outvars]

  def _crossing(self) -> dict:
    depends = self._dependences()
    crossing = {}
    for step in self._steps:
      if any(depends[number] & _THETA for number in step.outs):
        crossing |= dict.fromkeys(variables(step.ins))
    crossing |= dict.fromkeys(variables(self.outs))
    return self._narrowed([number for number in crossing if depends[number] == _DATA], depends)

  def _dependences(self) -> dict[int, int]:
    """{number: whether it depends on _DATA, _THETA, both or none}."""
    depends = dict.fromkeys(self._avals, 0)
    depends |= dict.fromkeys(jax.tree.leaves(self._inputs['batch']), _DATA)
    late = [self._inputs['theta'], self._inputs['rest']]
    depends |= dict.fromkeys(jax.tree.leaves(late), _THETA)
    for step in self._steps:
      found = 0
      for number in variables(step.ins):
        found |= depends[number]
      depends |= dict.fromkeys(step.outs, found)
    return depends

  def _narrowed(self, crossing: list[int], depends: dict[int, int]) -> dict:
    """What crosses. Where a cheap step made a value larger, its operands cross in its place.

    The step then runs in the second half.
    """
    maker = {number: step for step in self._steps for number in step.outs}
    narrowed = {}
    todo = list(crossing)
    for number in todo:
      step = maker.get(number)
      if step is not None and step.eqn.primitive.name in _CHEAP:
        operands = [i for i in variables(step.ins) if depends[i] == _DATA]
        if self._nbytes(operands) < self._nbytes([number]):
          todo += operands
          continue
      narrowed[number] = self._avals[number]
    return narrowed

  def _nbytes(self, numbers: list[int]) -> int:
    avals = [self._avals[number] for number in numbers]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
