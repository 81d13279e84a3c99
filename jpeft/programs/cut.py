"""A program cut in two where theta comes in: what lies before is the same at every step, for each
example.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from .equations import evaluated, inside, reader, variables

_DATA, _THETA = 1, 2
_CHEAP = ('broadcast_in_dim', 'convert_element_type')


@dataclasses.dataclass(frozen=True)
class Halves:
  """fn(theta, backbone, batch, *rest) = second(theta, backbone, first(backbone, batch), *rest).

  Attributes:
    features: shapes of what crosses, for one example: `first` gives them with the axis of the batch
      in front.
  """

  features: tuple[jax.ShapeDtypeStruct, ...]
  _fn: Callable[..., Any]
  _example: tuple  # shapes of (theta, backbone, batch, *rest)
  _axes: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Bytes of one example's features."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.features)

  def first(self, backbone, batch) -> tuple[jax.Array, ...]:
    """What hangs on the batch and not on theta, [B, ...] each."""
    theta, _, _, *rest = self._example
    program = _Program(self._fn, theta, backbone, batch, *rest)
    found = program.run(program.crossing, backbone=backbone, batch=batch)
    return tuple(jnp.moveaxis(x, axis, 0) for x, axis in zip(found, self._axes, strict=True))

  def second(self, theta, backbone, features: Sequence[jax.Array], *rest):
    """The remainder of the program, on the features of a batch; differentiable in theta."""
    program = _Program(self._fn, theta, backbone, _sized(self._example[2], len(features[0])), *rest)
    moved = [jnp.moveaxis(x, 0, axis) for x, axis in zip(features, self._axes, strict=True)]
    known = dict(zip(program.crossing, moved, strict=True))
    return jax.tree.unflatten(
      program.tree, program.run(program.outs, known, theta=theta, backbone=backbone, rest=rest)
    )


def cut(fn: Callable[..., Any], theta, backbone, batch, *rest) -> Halves:
  """Cuts a program where theta comes in: what lies before can run once an example, not once a step.

  With a method that never runs the backbone backwards that is the whole backbone; with one that
  trains late blocks alone, all blocks before them. What an example gives must hang on that example
  alone (no statistics over a batch) and be the same each time (no dropout before theta).

  Args:
    fn: (theta, backbone, batch, *rest) -> out.
    theta: what is trained; shapes will do, here and below.
    backbone: what is frozen.
    batch: arrays [B, ...].
    *rest: whatever else changes from step to step, such as random keys.

  Raises:
    ValueError: something that crosses has not one axis of the size of the batch.
  """
  size = len(jax.tree.leaves(batch)[0])
  one, other = (
    _Program(fn, theta, backbone, _sized(batch, n), *rest).crossing.values()
    for n in (size, size + 1)
  )
  axes, features = [], []
  for a, b in zip(one, other, strict=True):
    moved = [i for i, pair in enumerate(zip(a.shape, b.shape, strict=True)) if pair[0] != pair[1]]
    if len(moved) != 1 or a.shape[moved[0]] != size:
      raise ValueError(
        f'an array of shape {list(a.shape)}, computed before theta comes in from a batch of {size}, '
        'has no axis of the examples, so it cannot be kept for each of them'
      )
    axes.append(moved[0])
    features.append(jax.ShapeDtypeStruct(a.shape[: moved[0]] + a.shape[moved[0] + 1 :], a.dtype))
  return Halves(
    tuple(features), fn, jax.eval_shape(lambda *x: x, theta, backbone, batch, *rest), tuple(axes)
  )


def _sized(batch, size: int):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)


class _Step(NamedTuple):
  """An equation; every value of the program has a number, whatever call it lies in."""

  eqn: Any
  ins: list[int | jex.Literal]
  outs: list[int]


class _Program:
  """A traced program as steps, and what crosses from those that hang on the batch to those that
  hang on theta.

  Attributes:
    tree: the structure of the output.
    outs: its values.
    crossing: {value: shape}.
  """

  def __init__(self, fn, theta, backbone, batch, *rest):
    given = {'theta': theta, 'backbone': backbone, 'batch': batch, 'rest': rest}
    closed, out = jax.make_jaxpr(
      lambda given: fn(given['theta'], given['backbone'], given['batch'], *given['rest']),
      return_shape=True,
    )(given)
    self.tree = jax.tree.structure(out)
    self._steps, self._avals, self._constants, self._numbers = [], {}, {}, itertools.count()
    inputs = [self._new(v.aval) for v in closed.jaxpr.invars]
    self._inputs = jax.tree.unflatten(jax.tree.structure(given), inputs)
    self.outs = self._inline(closed, inputs)

    color = {i: 0 for i in self._avals}
    color |= {i: _DATA for i in jax.tree.leaves(self._inputs['batch'])}
    color |= {i: _THETA for i in jax.tree.leaves([self._inputs['theta'], self._inputs['rest']])}
    for step in self._steps:
      hue = 0
      for i in variables(step.ins):
        hue |= color[i]
      color |= dict.fromkeys(step.outs, hue)
    late = [
      i
      for step in self._steps
      if any(color[o] & _THETA for o in step.outs)
      for i in variables(step.ins)
    ]
    self.crossing = self._narrowed(
      dict.fromkeys(i for i in (*late, *variables(self.outs)) if color[i] == _DATA), color
    )

  def run(self, wanted: Iterable, known: dict | None = None, **given) -> list:
    """The values `wanted`, by no more steps than it takes, from inputs by section and from `known`
    values.
    """
    env = {**self._constants, **(known or {})}
    for section, tree in given.items():
      env |= zip(jax.tree.leaves(self._inputs[section]), jax.tree.leaves(tree), strict=True)
    wanted = list(wanted)
    missing, steps = set(variables(wanted)) - set(env), []
    for step in reversed(self._steps):
      if missing & set(step.outs):
        steps.append(step)
        missing |= set(variables(step.ins)) - set(env)
    read = reader(env)
    for step in reversed(steps):
      known = {
        v: read(i)
        for i, v in zip(step.ins, step.eqn.invars, strict=True)
        if not isinstance(v, jex.Literal)
      }
      env |= zip(step.outs, evaluated(step.eqn, known.__getitem__), strict=True)
    return [read(i) for i in wanted]

  def _new(self, aval) -> int:
    number = next(self._numbers)
    self._avals[number] = aval
    return number

  def _inline(self, closed, ins: list) -> list:
    """Notes the steps of a jaxpr; a jit may reach into both halves, so it is taken apart."""
    jaxpr, env = closed.jaxpr, {}
    env |= zip(jaxpr.invars, ins, strict=True)
    for v, value in zip(jaxpr.constvars, closed.consts, strict=True):
      env[v] = self._new(v.aval)
      self._constants[env[v]] = value
    read = lambda v: v if isinstance(v, jex.Literal) else env[v]
    for eqn in jaxpr.eqns:
      args = [read(v) for v in eqn.invars]
      if inner := inside(eqn):
        outs = self._inline(inner, args)
      else:
        outs = [self._new(v.aval) for v in eqn.outvars]
        self._steps.append(_Step(eqn, args, outs))
      env |= zip(eqn.outvars, outs, strict=True)
    return [read(v) for v in jaxpr.outvars]

  def _narrowed(self, crossing: dict, color: dict) -> dict:
    """What crosses; where a cheap step made it larger, what that step took, and the step runs in
    the second half.
    """
    maker = {o: step for step in self._steps for o in step.outs}
    bytes_of = lambda names: sum(
      math.prod(self._avals[i].shape) * self._avals[i].dtype.itemsize for i in names
    )
    out, todo = {}, list(crossing)
    for i in todo:
      step = maker.get(i)
      taken = [j for j in variables(step.ins) if color[j] == _DATA] if step else []
      if step and step.eqn.primitive.name in _CHEAP and bytes_of(taken) < bytes_of([i]):
        todo += taken
      else:
        out[i] = self._avals[i]
    return out
