"""Whether a function treats the entries of an axis each by itself, read off its traced program."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core as jex

from .equations import inside

# Operations on numbers, each by itself.
_OF_NUMBERS = frozenset(
  (
    'abs add add_any and cbrt ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv '
    'erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne '
    'neg not or pow reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient '
    'sub tan tanh xor'
  ).split()
)
_REDUCTIONS = frozenset(
  'argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum'.split()
)
_SCANS = frozenset('cumlogsumexp cummax cummin cumprod cumsum'.split())
_RANDOM = frozenset('random_bits rng_bit_generator threefry2x32'.split())
# Calls of a function of one's own, by the name of the parameter that has its program.
_CALLS = {
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'checkpoint': 'jaxpr',
  'remat2': 'jaxpr',
}
# A product of rows [..., in] with a matrix that is stored otherwise: of each row by itself.
_OF_ROWS = ('coded_product',)


class _Mixed(Exception):
  """What does not treat entries each by itself."""


def mixing(fn: Callable[..., Any], x: jax.ShapeDtypeStruct, axis: int) -> str:
  """Why fn(x) may not be made of some entries of an axis at a time; '' if it may.

  Each entry of the output, along the same axis, must depend on that of x alone, and on nothing that
  is drawn for it. That is read off two programs, of x and of x with one entry more: what grows
  belongs to entries. An operation that is not known is taken for one that mixes them.

  Args:
    fn: x -> one array.
    x: shape and dtype.
    axis: of x and of the output.
  """
  shape = list(x.shape)
  shape[axis] += 1
  programs = [jax.make_jaxpr(fn)(one) for one in (x, jax.ShapeDtypeStruct(shape, x.dtype))]
  try:
    _check(*programs)
    (small,), (large,) = (program.out_avals for program in programs)
    if _grown(small.shape, large.shape) != axis or small.shape[axis] != x.shape[axis]:
      raise _Mixed(f'it makes {list(small.shape)} of {list(x.shape)}')
  except _Mixed as found:
    return str(found)
  return ''


def _grown(small: tuple[int, ...], large: tuple[int, ...]) -> int | None:
  """The axis that grew; None if none did."""
  if len(small) != len(large):
    raise _Mixed('it computes something else of more tokens')
  found = [i for i, (n, m) in enumerate(zip(small, large, strict=True)) if n != m]
  if len(found) > 1:
    raise _Mixed('it makes an array of pairs of tokens')
  return found[0] if found else None


class _Step:
  """An equation of both programs.

  Attributes:
    name: of the operation.
    params: of it in the smaller program.
    ins, outs: (shape, the axis that grew or None) of its inputs and outputs.
  """

  def __init__(self, small, large):
    self.name = small.primitive.name
    self.params = small.params
    self.ins = list(_pairs(small.invars, large.invars))
    self.outs = list(_pairs(small.outvars, large.outvars))


def _pairs(small, large) -> Iterator[tuple[tuple[int, ...], int | None]]:
  for one, other in zip(small, large, strict=True):
    if isinstance(one, jex.Literal) and repr(one.val) != repr(other.val):  # nan is nan
      raise _Mixed('it computes with the number of tokens')
    shape = one.aval.shape
    yield shape, _grown(shape, other.aval.shape)


def _check(small: jex.ClosedJaxpr, large: jex.ClosedJaxpr) -> None:
  """Raises _Mixed if an equation mixes entries."""
  names = [[eqn.primitive.name for eqn in program.jaxpr.eqns] for program in (small, large)]
  if names[0] != names[1]:
    raise _Mixed('it computes something else of more tokens')
  for one, other in zip(small.jaxpr.eqns, large.jaxpr.eqns, strict=True):
    step = _Step(one, other)
    if all(axis is None for _, axis in (*step.ins, *step.outs)):
      continue
    if not _check_call(one, other) and not _is_by_entry(step):
      kind = 'draws random numbers' if step.name in _RANDOM else 'may mix tokens'
      raise _Mixed(f'the operation {step.name!r} in it {kind}')


def _check_call(small, large) -> bool:
  """Whether an equation calls a program, which is then checked."""
  called = [inside(eqn) for eqn in (small, large)]
  key = _CALLS.get(small.primitive.name)
  if key is not None:
    called = [eqn.params[key] for eqn in (small, large)]
  if called[0] is None:
    return False
  closed = [x if isinstance(x, jex.ClosedJaxpr) else jex.ClosedJaxpr(x, ()) for x in called]
  _check(*closed)
  return True


def _is_by_entry(step: _Step) -> bool:
  """Whether an operation keeps entries apart, and in their order."""
  name = step.name
  if name in _OF_NUMBERS:
    ((out, out_axis),) = step.outs
    # Inputs may be scalars, or have axes of length 1 for what all entries have alike.
    return all(
      axis == out_axis or axis is None and (shape == () or shape[out_axis] == 1)
      for shape, axis in step.ins
    )
  if name == 'optimization_barrier':
    return step.ins == step.outs
  if name == 'dot_general':
    contracted, _ = step.params['dimension_numbers']
    grown = [axis for _, axis in step.ins]
    alone = grown.count(None) == 1
    return alone and all(a not in axes for a, axes in zip(grown, contracted, strict=True))
  if name in _OF_ROWS:
    (shape, axis), *others = step.ins
    return axis != len(shape) - 1 and all(other is None for _, other in others)
  if name == 'concatenate':
    (_, axis), *_ = step.outs
    return axis != step.params['dimension'] and all(own == axis for _, own in step.ins)
  (out, out_axis), *_ = step.outs
  if name == 'iota':
    return out_axis != step.params['dimension']
  (shape, axis), *others = step.ins or [((), None)]
  if any(other is not None for _, other in others):
    return False
  if axis is None:
    return name == 'broadcast_in_dim'  # of what all entries have alike
  if name in _REDUCTIONS:
    return axis not in step.params['axes']
  if name in _SCANS:
    return axis != step.params['axis']
  if name == 'broadcast_in_dim':
    return step.params['broadcast_dimensions'][axis] == out_axis and out[out_axis] == shape[axis]
  if name in ('reshape', 'squeeze', 'expand_dims'):
    return out_axis is not None and math.prod(shape[axis + 1 :]) == math.prod(out[out_axis + 1 :])
  if name == 'transpose':
    return step.params['permutation'][out_axis] == axis
  if name == 'slice':
    return out[axis] == shape[axis] and step.params['start_indices'][axis] == 0
  if name == 'pad':
    return step.params['padding_config'][axis] == (0, 0, 0)
  if name == 'split':
    return axis != step.params['axis']
  return False
