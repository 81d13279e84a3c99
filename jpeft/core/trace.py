"""How each parameter is used, read from the jaxpr: no framework, no table of layer types."""

from collections.abc import Sequence
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
  'optimization_barrier',
  'stop_gradient',
  'reshard',
}
# Primitives that keep the order of the axes, but not the array.
_LIKE = {'neg', 'slice', 'dynamic_slice', 'concatenate', 'rev', 'pad'}
_ELEMENTWISE = {'add', 'sub', 'mul', 'div', 'max', 'min'}
# Where an array meets an activation as a whole; with constants alone (a spectral norm's power
# iteration, zeros as a first state) it counts only if the array meets no activation elsewhere.
_PRODUCTS = {'dot_general', 'conv_general_dilated', 'gather'}

# For every axis of an array: the stored axes that it comes from.
Dims = tuple[tuple[int, ...], ...]


class Use(NamedTuple):
  """How an array meets the activations; axes are counted in the array as stored.

  Attributes:
    primitive: the name of the operation.
    ins: the axes that it sums over, or looks up.
    batch: its batch axes, and those of which one entry at a time is taken, such as an expert's.
    scanned: the axes that scans around the operation have sliced off, outermost first.
    offset: a constant that is added to the array before.
    direct: whether the operation reads the array itself, moved at most; else the array is scaled,
      masked, normalised, joined with others or the like before.
    count: of operations that do so, where they are products.
  """

  primitive: str = 'unused'
  ins: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  scanned: tuple[int, ...] = ()
  offset: float = 0.0
  direct: bool = True
  count: int = 1


class _Traced(NamedTuple):
  """A parameter in a value of the jaxpr, with its axes moved or merged."""

  name: str
  dims: Dims
  scanned: tuple[int, ...] = ()
  offset: float = 0.0
  direct: bool = True
  picked: tuple[int, ...] = ()  # stored axes of which the program takes one entry at a time


class _Value(NamedTuple):
  """What is known of a value of the jaxpr.

  Attributes:
    traced: the parameters in it: several where kernels are joined, or added.
    static: whether it depends on parameters and constants alone, and not on an activation.
  """

  traced: tuple[_Traced, ...] = ()
  static: bool = True


_CONSTANT = _Value()
_ACTIVATION = _Value(static=False)


class _Found(NamedTuple):
  """The first use of each parameter: with activations, in products and elsewhere with constants."""

  active: dict[str, Use]
  products: dict[str, Use]
  others: dict[str, Use]


def uses(fn, params: dict, *rest) -> dict[str, Use]:
  """How fn(params, *rest) uses each array of the flat dict `params`.

  An array that is not used is not in the result.
  """
  jaxpr = jax.make_jaxpr(fn)(params, *rest).jaxpr
  known = dict.fromkeys(jaxpr.invars, _ACTIVATION)
  # jax flattens a dict in the order of its sorted keys.
  for name, variable in zip(sorted(params), jaxpr.invars, strict=False):
    axes = range(variable.aval.ndim)
    known[variable] = _Value((_Traced(name, tuple((axis,) for axis in axes)),))
  found = _Found({}, {}, {})
  _walk(jaxpr, known, found)
  return {**found.others, **found.products, **found.active}


def _walk(jaxpr, known: dict, found: _Found) -> None:
  """Follows the parameters through a jaxpr.

  Args:
    known: {variable: _Value}; extended on the way.
    found: extended on the way.
  """
  for eqn in jaxpr.eqns:
    operands = [_lookup(known, variable) for variable in eqn.invars]
    static = all(value.static for value in operands)
    for variable in eqn.outvars:
      known[variable] = _CONSTANT if static else _ACTIVATION
    if not any(value.traced for value in operands):
      continue
    if eqn.primitive.name == 'scan':
      _scan(eqn, operands, found)
    elif eqn.primitive.name == 'while':
      _while(eqn, operands, found)
    elif _sub_jaxprs(eqn):  # jit, remat, custom_jvp, cond
      _call(eqn, operands, known, found)
    else:
      _operation(eqn, operands, known, found)


def _lookup(known: dict, variable) -> _Value:
  if isinstance(variable, jex.Literal):
    return _CONSTANT
  return known.get(variable, _CONSTANT)  # else a constant that the jaxpr closes over


def _enter(jaxpr, operands: Sequence[_Value], found: _Found) -> dict:
  """Walks the jaxpr inside an equation; {variable of it: _Value}."""
  known = dict(zip(jaxpr.invars, operands, strict=False))
  _walk(jaxpr, known, found)
  return known


def _carried(value: _Value) -> _Value:
  """A value that a loop carries: from the second round on an activation, if it is no parameter."""
  return value if value.traced else _ACTIVATION


def _scan(eqn, operands, found) -> None:
  consts = eqn.params['num_consts']
  whole = consts + eqn.params['num_carry']
  carry = [_carried(value) for value in operands[consts:whole]]
  slices = [_sliced(value) for value in operands[whole:]]
  _enter(eqn.params['jaxpr'].jaxpr, [*operands[:consts], *carry, *slices], found)


def _sliced(value: _Value) -> _Value:
  """One step's slice of a scanned array."""
  traced = []
  for one in value.traced:
    first, *rest = one.dims
    traced.append(one._replace(dims=tuple(rest), scanned=(*one.scanned, *first)))
  return value._replace(traced=tuple(traced))


def _while(eqn, operands, found) -> None:
  # The operands are the constants of the condition, those of the body, and the carry.
  of_condition = eqn.params['cond_nconsts']
  of_body = of_condition + eqn.params['body_nconsts']
  carry = [_carried(value) for value in operands[of_body:]]
  _enter(eqn.params['cond_jaxpr'].jaxpr, [*operands[:of_condition], *carry], found)
  _enter(eqn.params['body_jaxpr'].jaxpr, [*operands[of_condition:of_body], *carry], found)


def _call(eqn, operands, known: dict, found) -> None:
  inside = []
  for sub in _sub_jaxprs(eqn):
    # Of `cond` the first operand is the index of the branch.
    inner = _enter(sub, operands[len(operands) - len(sub.invars) :], found)
    inside.append([_lookup(inner, variable) for variable in sub.outvars])
  for variable, *values in zip(eqn.outvars, *inside, strict=False):
    traced = next((value.traced for value in values if value.traced), ())
    known[variable] = _Value(traced, all(value.static for value in values))


def _sub_jaxprs(eqn) -> list:
  """The jaxprs that an equation calls with its own last operands."""
  parameters = list(eqn.params.values())
  leaves = jax.tree.leaves(parameters, is_leaf=lambda x: isinstance(x, jex.Jaxpr))
  opened = [getattr(leaf, 'jaxpr', leaf) for leaf in leaves]
  arity = len(eqn.invars)
  return [sub for sub in opened if isinstance(sub, jex.Jaxpr) and len(sub.invars) <= arity]


def _operation(eqn, operands, known: dict, found: _Found) -> None:
  """An equation that moves or changes parameters, or uses them."""
  static = all(value.static for value in operands)
  passed = []
  for position, (value, (ins, batch)) in enumerate(zip(operands, _roles(eqn), strict=True)):
    for traced in value.traced:
      moved = _moved(eqn, operands, position, traced)
      if moved is not None:
        passed.append(moved)
        continue
      use = Use(
        primitive=eqn.primitive.name,
        ins=_stored_axes(traced, ins),
        batch=tuple(sorted({*traced.picked, *_stored_axes(traced, batch)})),
        scanned=traced.scanned,
        offset=traced.offset,
        direct=traced.direct,
      )
      kind = found.active
      if static:
        kind = found.products if eqn.primitive.name in _PRODUCTS else found.others
      before = kind.setdefault(traced.name, use)
      if before is not use and eqn.primitive.name in _PRODUCTS:
        kind[traced.name] = before._replace(count=before.count + 1)
  if passed:
    known[eqn.outvars[0]] = _Value(tuple(passed), static)


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


def _moved(eqn, operands: Sequence[_Value], position: int, traced: _Traced) -> _Traced | None:
  """A parameter behind a primitive that only moves or changes it; None for one that uses it.

  Args:
    eqn: the equation.
    operands: what is known of its operands.
    position: which of them the parameter is in.
    traced: the parameter.
  """
  name = eqn.primitive.name
  params = eqn.params
  dims = traced.dims
  shape = eqn.invars[position].aval.shape
  if name in _SAME:
    return traced
  if name == 'transpose':
    return traced._replace(dims=tuple(dims[axis] for axis in params['permutation']))
  if name == 'squeeze':
    kept = [stored for axis, stored in enumerate(dims) if axis not in params['dimensions']]
    return traced._replace(dims=tuple(kept))
  if name == 'broadcast_in_dim':
    sources = dict(zip(params['broadcast_dimensions'], dims, strict=True))
    spread = [sources.get(axis, ()) for axis in range(len(params['shape']))]
    return traced._replace(dims=tuple(spread))
  if name == 'reshape':
    reshaped = _reshaped(shape, params['new_sizes'], dims)
    return None if reshaped is None else traced._replace(dims=reshaped)
  if name == 'dynamic_slice' and not all(value.static for value in operands[1:]):
    picked = _picked(shape, params['slice_sizes'])
    if picked is not None:
      stored = _stored_axes(traced, picked)
      rest = tuple(() if axis in picked else of_axis for axis, of_axis in enumerate(dims))
      return traced._replace(dims=rest, picked=(*traced.picked, *stored))
  changed = traced._replace(offset=traced.offset + _added(eqn), direct=False)
  if name in _LIKE:
    return changed
  if name == 'stack':
    axis = params['axis']
    return changed._replace(dims=(*dims[:axis], (), *dims[axis:]))
  if name in _ELEMENTWISE and shape and _others_are_scalars(eqn, operands):
    return changed  # w * 2, 1 + scale: the same array for whoever looks for what it multiplies
  if name in _PRODUCTS or not all(value.static for value in operands):
    return None
  # Standardised, masked, normalised, rounded, ...: an array of the same shape made of constants.
  keeps_shape = len(eqn.outvars) == 1 and eqn.outvars[0].aval.shape == shape
  return changed if keeps_shape and shape else None


def _picked(shape, sizes) -> tuple[int, ...] | None:
  """The axes of which a slice has one entry; None if it cuts another axis short."""
  cut = [axis for axis, (whole, size) in enumerate(zip(shape, sizes, strict=True)) if size < whole]
  if all(sizes[axis] == 1 for axis in cut):
    return tuple(cut)
  return None


def _others_are_scalars(eqn, operands: Sequence[_Value]) -> bool:
  pairs = zip(eqn.invars, operands, strict=True)
  return all(not variable.aval.shape for variable, value in pairs if not value.traced)


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
