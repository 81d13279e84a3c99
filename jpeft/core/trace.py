"""How each parameter is used, read from the jaxpr: no framework, no table of layer types."""

from typing import NamedTuple

import jax
from jax.extend import core as jex

# Primitives whose output is their input, axis by axis.
_SAME = {
  'convert_element_type',
  'copy',
  'reduce_precision',
  'sharding_constraint',
  'name',
  'neg',
  'optimization_barrier',
  'slice',
  'dynamic_slice',
  'stop_gradient',
  'reshard',
  'concatenate',
}
_ELEMENTWISE = {'add', 'sub', 'mul', 'div', 'max', 'min'}

# For every axis of an array: the stored axes that it comes from.
Dims = tuple[tuple[int, ...], ...]


class Use(NamedTuple):
  """The first use of an array; axes are counted in the array as stored.

  Attributes:
    primitive: the name of the operation.
    ins: the axes that it sums over, or looks up.
    batch: its batch axes.
    scanned: the axes that scans around the operation have sliced off, outermost first.
    offset: a constant that is added to the array before.
  """

  primitive: str = 'unused'
  ins: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  scanned: tuple[int, ...] = ()
  offset: float = 0.0


class _Traced(NamedTuple):
  """A value of the jaxpr that is still a parameter, with its axes moved or merged."""

  name: str
  dims: Dims
  scanned: tuple[int, ...] = ()
  offset: float = 0.0


def uses(fn, params: dict, *rest) -> dict[str, Use]:
  """The first use of each array of the flat dict `params` in fn(params, *rest).

  An array that is not used is not in the result.
  """
  jaxpr = jax.make_jaxpr(fn)(params, *rest).jaxpr
  known = {}
  # jax flattens a dict in the order of its sorted keys.
  for name, variable in zip(sorted(params), jaxpr.invars, strict=False):
    axes = range(variable.aval.ndim)
    known[variable] = _Traced(name, tuple((axis,) for axis in axes))
  found = {}
  _walk(jaxpr, known, found)
  return found


def _walk(jaxpr, known: dict, found: dict[str, Use]) -> None:
  """Follows the parameters through a jaxpr.

  Args:
    known: {variable: _Traced}; extended on the way.
    found: {name: its first use}; extended on the way.
  """
  for eqn in jaxpr.eqns:
    operands = [_lookup(known, variable) for variable in eqn.invars]
    if not any(operands):
      continue
    if eqn.primitive.name == 'scan':
      _scan(eqn, operands, found)
    elif eqn.primitive.name == 'while':
      _while(eqn, operands, found)
    elif _sub_jaxprs(eqn):  # jit, remat, custom_jvp, cond
      _call(eqn, operands, known, found)
    else:
      _operation(eqn, operands, known, found)


def _lookup(known: dict, variable) -> _Traced | None:
  if isinstance(variable, jex.Literal):
    return None
  return known.get(variable)


def _enter(jaxpr, operands, found) -> dict:
  """Walks the jaxpr inside an equation; {variable of it: _Traced}."""
  known = {}
  for variable, traced in zip(jaxpr.invars, operands, strict=False):
    if traced:
      known[variable] = traced
  _walk(jaxpr, known, found)
  return known


def _scan(eqn, operands, found) -> None:
  whole = eqn.params['num_consts'] + eqn.params['num_carry']
  slices = [_sliced(traced) for traced in operands[whole:]]
  _enter(eqn.params['jaxpr'].jaxpr, [*operands[:whole], *slices], found)


def _sliced(traced: _Traced | None) -> _Traced | None:
  """One step's slice of a scanned array."""
  if traced is None:
    return None
  first, *rest = traced.dims
  return traced._replace(dims=tuple(rest), scanned=(*traced.scanned, *first))


def _while(eqn, operands, found) -> None:
  # The operands are the constants of the condition, those of the body, and the carry.
  of_condition = eqn.params['cond_nconsts']
  carry = of_condition + eqn.params['body_nconsts']
  condition = [*operands[:of_condition], *operands[carry:]]
  _enter(eqn.params['cond_jaxpr'].jaxpr, condition, found)
  _enter(eqn.params['body_jaxpr'].jaxpr, operands[of_condition:], found)


def _call(eqn, operands, known: dict, found) -> None:
  for sub in _sub_jaxprs(eqn):
    # Of `cond` the first operand is the index of the branch.
    inner = _enter(sub, operands[len(operands) - len(sub.invars) :], found)
    for outside, inside in zip(eqn.outvars, sub.outvars, strict=False):
      traced = _lookup(inner, inside)
      if traced:
        known[outside] = traced


def _sub_jaxprs(eqn) -> list:
  """The jaxprs that an equation calls with its own last operands."""
  parameters = list(eqn.params.values())
  leaves = jax.tree.leaves(parameters, is_leaf=lambda x: isinstance(x, jex.Jaxpr))
  opened = [getattr(leaf, 'jaxpr', leaf) for leaf in leaves]
  arity = len(eqn.invars)
  return [sub for sub in opened if isinstance(sub, jex.Jaxpr) and len(sub.invars) <= arity]


def _operation(eqn, operands, known: dict, found) -> None:
  """An equation that moves a parameter, or uses it."""
  first = next(traced for traced in operands if traced)
  moved = _moved(eqn, operands, first)
  if moved is not None:
    known[eqn.outvars[0]] = first._replace(dims=moved, offset=first.offset + _added(eqn))
    return
  for traced, (ins, batch) in zip(operands, _roles(eqn), strict=True):
    if traced:
      use = Use(
        primitive=eqn.primitive.name,
        ins=_stored_axes(traced, ins),
        batch=_stored_axes(traced, batch),
        scanned=traced.scanned,
        offset=traced.offset,
      )
      found.setdefault(traced.name, use)


def _stored_axes(traced: _Traced, axes) -> tuple[int, ...]:
  return tuple(sorted({stored for axis in axes for stored in traced.dims[axis]}))


def _added(eqn) -> float:
  """The constant c of w + c and w - c; 0 for any other equation."""
  if eqn.primitive.name == 'add':
    sign, constants = 1, eqn.invars
  elif eqn.primitive.name == 'sub':
    sign, constants = -1, eqn.invars[1:]
  else:
    return 0.0
  for operand in constants:
    if isinstance(operand, jex.Literal):
      return sign * float(operand.val)
  return 0.0


def _roles(eqn) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """For every operand: the axes that the primitive sums over (or looks up), and its batch axes."""
  name = eqn.primitive.name
  dims = eqn.params.get('dimension_numbers')
  neither = ((), ())
  if name == 'dot_general':
    (left, right), (left_batch, right_batch) = dims
    return [(left, left_batch), (right, right_batch)]
  if name == 'conv_general_dilated':
    return [neither, (dims.rhs_spec[1:], ())]
  others = len(eqn.invars) - 1
  if name == 'gather':
    return [(dims.collapsed_slice_dims, ())] + [neither] * others
  return [neither] * (1 + others)


def _moved(eqn, operands, first: _Traced) -> Dims | None:
  """Where the axes go under a primitive that only moves or scales data; None for any other."""
  name = eqn.primitive.name
  params = eqn.params
  dims = first.dims
  shape = eqn.invars[operands.index(first)].aval.shape
  if name in _SAME:
    return dims
  if name in _ELEMENTWISE and shape and _others_are_scalars(eqn, operands):
    return dims  # w * 2, 1 + scale: the same array for whoever looks for what it multiplies
  if name == 'transpose':
    return tuple(dims[axis] for axis in params['permutation'])
  if name == 'squeeze':
    return tuple(stored for axis, stored in enumerate(dims) if axis not in params['dimensions'])
  if name == 'broadcast_in_dim':
    sources = dict(zip(params['broadcast_dimensions'], dims, strict=True))
    return tuple(sources.get(axis, ()) for axis in range(len(params['shape'])))
  if name == 'reshape':
    return _reshaped(shape, params['new_sizes'], dims)
  return None


def _others_are_scalars(eqn, operands) -> bool:
  pairs = zip(eqn.invars, operands, strict=True)
  return all(not variable.aval.shape for variable, traced in pairs if traced is None)


def _reshaped(shape, sizes, dims: Dims) -> Dims | None:
  """Axes kept, new axes of one, or old axes merged; None where an axis is split."""
  reshaped = []
  axis = 0
  for size in sizes:
    merged = ()
    length = 1
    while length < size and axis < len(shape):
      merged += dims[axis]
      length *= shape[axis]
      axis += 1
    if length != size:
      return None
    reshaped.append(merged)
  return tuple(reshaped)
