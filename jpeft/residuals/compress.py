"""What the backward pass of a function keeps, in few bits: of any function, found in its program.

`compressed(fn)` computes what fn computes. For its backward pass it keeps few values and computes
the others again:

- what a weight matrix or a convolution gives, followed through sums to where a nonlinear operation
  reads it, and the inputs of fn: codes of 4 bits in groups of 64;
- the derivative of a known activation (`tables`): 4-bit codes, of ReLU one bit; and its output,
  where something needs it. With 8 bits a value a table of 4 would be the coarsest part: then its
  input is kept, from which both follow;
- operands of products between activations (query, key, value): 8 bits. The products themselves,
  attention's logits and probabilities, are computed again: they are wide, they cost few FLOPs, and
  a code of theirs would be no smaller than their operands. An error of the operands is magnified by
  the softmax, hence the 8 bits;
- what is small (a low-rank product) and what no gradient crosses (masks, positions): as it is;
- weights and what is made of them: by reference.

Norms, dropout masks (from their keys), softmax and products of activations follow from these. What
a value is stored as does not depend on fn being a module; which of them are stored follows from the
backward program: only what a live equation of it reads. LayerNorm from 4-bit min-max codes of its
input is as exact as from codes of its output, since the one is an affine function of the other a
row.

The backward pass ties what was kept to the cotangent (`ops.tied`): in unrolled layers XLA would
else undo the saving.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jpeft.programs import evaluated, hoisted, inside, reader, variables

from .codes import bits_of, decode, derivative_codes, encode, look_up, pack, unpack
from .derivatives import FUNCTIONS, Table, table
from .ops import tied

_PRODUCTS = {'dot_general', 'conv_general_dilated', 'ragged_dot_general'}
# Programs of their own, or dear to compute again: their outputs are kept.
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
_THROUGH = {'add', 'sub', 'neg', 'copy', 'convert_element_type', 'mul', 'div'}
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
_SMALL = 8  # an array this many times smaller than the widest input is kept as it is


def compressed(fn: Callable, bits: int = 4, operand_bits: int = 8) -> Callable:
  """fn with a backward pass that keeps few bits.

  Args:
    fn: (held, *args, **kwargs) -> output, pure. `held` is what need not be kept: weights.
    bits: of values that are kept, 4 or 8.
    operand_bits: of operands of products between activations.

  Returns:
    A function of the same arguments and output, differentiable once, in reverse.
  """

  def run(held, *args, **kwargs):
    leaves, tree = jax.tree.flatten((held, args, kwargs))
    dynamic = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]
    n_held = sum(i < len(jax.tree.leaves(held)) for i in dynamic)
    shapes = []

    def flat(*arrays):
      filled = list(leaves)
      for i, x in zip(dynamic, arrays, strict=True):
        filled[i] = x
      held, args, kwargs = jax.tree.unflatten(tree, filled)
      out, shape = jax.tree.flatten(fn(held, *args, **kwargs))
      shapes[:] = [shape]
      return out

    arrays = [leaves[i] for i in dynamic]
    program, captured = _program(flat, arrays)
    n_free = len(captured) + n_held
    outputs = _stored(program, n_free, bits, operand_bits)(*captured, *arrays)
    return jax.tree.unflatten(shapes[0], outputs)

  return run


def _program(fn, arrays) -> tuple[Any, list]:
  """(a jaxpr without inner calls, what fn closes over: its first inputs)."""
  closed = jax.make_jaxpr(fn)(*arrays)
  n = len(closed.consts)
  inlined = jax.make_jaxpr(lambda *xs: _evaluate(closed.jaxpr, xs[n:], {}, xs[:n]))(
    *closed.consts, *arrays
  )
  jaxpr, consts = hoisted(inlined)
  return jaxpr, [*consts, *closed.consts]


def _evaluate(jaxpr, inputs, at: dict, consts=()) -> list:
  """Runs a jaxpr; at[variable] (value, read) -> value stands in for what its equation gives."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
  read = reader(env)
  for eqn in jaxpr.eqns:
    if inner := inside(eqn):
      outs = _evaluate(inner.jaxpr, [read(v) for v in eqn.invars], {}, inner.consts)
    else:
      outs = evaluated(eqn, read)
    env |= zip(eqn.outvars, outs, strict=True)
    for v in eqn.outvars:
      if v in at:
        env[v] = at[v](env[v], read)
  return [read(v) for v in jaxpr.outvars]


# What to keep


@dataclasses.dataclass(frozen=True)
class _Kept:
  """How one value is kept: in groups of `bits`, or as it is (None)."""

  aval: Any
  bits: int | None

  def pack(self, x):
    return x if self.bits is None else encode(x, self.bits)

  def unpack(self, packed):
    return (
      packed if self.bits is None else decode(packed, self.aval.shape, self.aval.dtype, self.bits)
    )


@dataclasses.dataclass(frozen=True)
class _Choice:
  """What may be kept of a program.

  Attributes:
    values: {variable: how}: outputs of equations.
    codes: {variable: (the variable that an activation reads, its table)}.
    inputs: {index of an input: how}, of those that are not weights.
  """

  values: dict
  codes: dict
  inputs: dict


def _choose(jaxpr, n_free: int, bits: int, operand_bits: int) -> _Choice:
  """Everything that could be kept; what is, follows from the backward pass."""
  active, consumers = set(jaxpr.invars[n_free:]), {}
  for eqn in jaxpr.eqns:
    if any(v in active for v in variables(eqn.invars)):
      active.update(eqn.outvars)
    for v in set(variables(eqn.invars)):
      consumers.setdefault(v, []).append(eqn)
  finished = set(variables(jaxpr.outvars))
  again = [
    e
    for e in jaxpr.eqns
    if e.primitive.name in _PRODUCTS
    and set(variables(e.invars)) <= active
    and len(variables(e.invars)) > 1
  ]
  activations = _activations(jaxpr, consumers, finished, active, bits)
  anchors = dict.fromkeys(activations)
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in _PRODUCTS | _OPAQUE and eqn not in again:
      anchors |= dict.fromkeys(
        _followed(v, consumers, finished) for v in eqn.outvars if v in active
      )
  widest = max((v.aval.size for v in jaxpr.invars[n_free:] if _is_float(v)), default=0)
  operands = _before(jaxpr, again, {*anchors, *jaxpr.invars})

  def how(v):
    if not _is_float(v) or v.aval.size * _SMALL <= widest:
      return _Kept(v.aval, None)
    return _Kept(v.aval, operand_bits if v in operands else bits)

  inputs = {i: how(v) for i, v in enumerate(jaxpr.invars) if i >= n_free}
  return _Choice({v: how(v) for v in anchors}, activations, inputs)


def _is_float(v) -> bool:
  return jnp.issubdtype(v.aval.dtype, jnp.floating)


def _followed(v, consumers, finished):
  """Where a value ends up through sums and scales that it alone enters: there it is as good, and
  often two in one.
  """
  while v not in finished and len(consumers.get(v, ())) == 1:
    (eqn,) = consumers[v]
    if eqn.primitive.name not in _THROUGH or eqn.outvars[0].aval.shape != v.aval.shape:
      break
    if eqn.primitive.name in ('mul', 'div') and not all(
      x is v or isinstance(x, jex.Literal) or not x.aval.shape for x in eqn.invars
    ):
      break
    if not _is_float(eqn.outvars[0]) or eqn.outvars[0].aval.dtype.itemsize > v.aval.dtype.itemsize:
      break
    v = eqn.outvars[0]
  return v


def _before(jaxpr, eqns, stops) -> set:
  """The members of `stops` that `eqns` read, through equations that are computed again."""
  made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
  found, seen, todo = set(), set(), [v for eqn in eqns for v in variables(eqn.invars)]
  while todo:
    v = todo.pop()
    if v in stops:
      found.add(v)
    elif v not in seen and v in made:
      todo += variables(made[v].invars)
    seen.add(v)
  return found


# Activations


def _activations(jaxpr, consumers, finished, active, bits: int) -> dict:
  """{output: (input, table)} of the elementwise functions of one variable that have an exact table
  or one of `bits`.
  """
  root, sources = {}, {}
  for eqn in jaxpr.eqns:
    ins, out = set(variables(eqn.invars)), eqn.outvars[0]
    roots = {root.get(v, v) for v in ins}
    if not _elementwise(eqn) or len(roots) != 1 or not ins <= active:
      continue
    (r,) = roots
    if r.aval.shape == out.aval.shape and r.aval.shape and _is_float(r):
      root[out] = r
      sources[out] = [*dict.fromkeys(e for v in ins for e in sources.get(v, ())), eqn]
  found = {}
  for out, r in root.items():
    leaves = out in finished or any(root.get(e.outvars[0]) is not r for e in consumers.get(out, ()))
    if leaves and out.aval.dtype == r.aval.dtype and len(sources[out]) > 0:
      name = _recognised(_ordered(jaxpr, sources[out]), r, out)
      if name and bits_of(table(name)) in (1, bits):
        found[out] = (r, table(name))
  return found


def _elementwise(eqn) -> bool:
  inner = eqn.params.get('call_jaxpr') or eqn.params.get('jaxpr')
  if inner is not None:
    return (eqn.primitive.name == 'custom_jvp_call' or inside(eqn)) and all(
      map(_elementwise, inner.jaxpr.eqns)
    )
  return eqn.primitive.name in _ELEMENTWISE and len(eqn.outvars) == 1


def _ordered(jaxpr, eqns) -> list:
  chosen = set(map(id, eqns))
  return [e for e in jaxpr.eqns if id(e) in chosen]


_GRID = np.linspace(-4, 4, 65)


def _recognised(eqns, source, out) -> str | None:
  """The name of the function that the equations compute, by its values."""
  tolerance = 2e-3 if source.aval.dtype.itemsize >= 4 else 3e-2
  with jax.ensure_compile_time_eval():
    y = _on_grid(eqns, {source: jnp.asarray(_GRID, source.aval.dtype)})[out]
    if jnp.shape(y) != _GRID.shape:
      return None
    y = np.asarray(y, np.float64)
  far = {name: np.abs(smooth.f(_GRID) - y).max() for name, smooth in FUNCTIONS.items()}
  best = min(far, key=far.get)
  return best if far[best] <= tolerance else None


def _on_grid(eqns, env) -> dict:
  """Elementwise equations at other points than those they were traced for."""
  read = reader(env)
  for eqn in eqns:
    values = [read(v) for v in eqn.invars]
    inner = eqn.params.get('call_jaxpr') or eqn.params.get('jaxpr')
    if inner is not None:
      inside = dict(zip(inner.jaxpr.invars, values, strict=True))
      _on_grid(inner.jaxpr.eqns, inside)
      (out,) = inner.jaxpr.outvars
      env[eqn.outvars[0]] = out.val if isinstance(out, jex.Literal) else inside[out]
    elif eqn.primitive.name == 'broadcast_in_dim':
      env[eqn.outvars[0]] = values[0]
    else:
      env[eqn.outvars[0]] = eqn.primitive.bind(*jnp.broadcast_arrays(*values), **eqn.params)
  return env


# Forwards and backwards


@jax.custom_jvp
def _given(value, kept):
  """`kept` for its value, `value` for its derivative: nothing needs to compute `value`."""
  return kept


@_given.defjvp
def _(primals, tangents):
  return primals[1], tangents[0]


@jax.custom_jvp
def _sloped(x, y, slope):
  """y, whose derivative by x is slope."""
  return y


@_sloped.defjvp
def _(primals, tangents):
  _, y, slope = primals
  return y, (slope * tangents[0].astype(slope.dtype)).astype(y.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
  """What the forward pass tells the backward pass: names of what it kept, and which inputs have a
  gradient.
  """

  moved: tuple[int, ...]
  values: tuple
  codes: tuple
  inputs: tuple[int, ...]


def _stored(jaxpr, n_free: int, bits: int, operand_bits: int) -> Callable:
  """The program of a jaxpr as a function with a compressed backward pass; its first inputs are
  weights.
  """
  choice = _choose(jaxpr, n_free, bits, operand_bits)
  floats = [i for i, v in enumerate(jaxpr.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]

  @jax.custom_vjp
  def run(*inputs):
    return _evaluate(jaxpr, inputs, {})

  def forward(*inputs):
    moved = tuple(
      i for i, x in enumerate(inputs) if x.perturbed and jnp.issubdtype(x.value.dtype, jnp.inexact)
    )
    inputs = [x.value for x in inputs]
    plan = _needed(moved)
    seen = {}

    def catch(v):
      def see(value, read):
        if v in plan.values:
          seen[v] = value
        if v in plan.codes:
          source, t = choice.codes[v]
          seen[v, 'code'] = pack(derivative_codes(read(source), t), bits_of(t))
        return value

      return see

    outs = _evaluate(jaxpr, inputs, {v: catch(v) for v in (*plan.values, *plan.codes)})
    values = [choice.values[v].pack(seen[v]) for v in plan.values]
    codes = [seen[v, 'code'] for v in plan.codes]
    packed = {
      i: choice.inputs[i].pack(inputs[i]) for i in plan.inputs if i >= n_free and i in moved
    }
    # Packed before anybody reads the output: later, what is packed would have to wait in full.
    outs, values, codes, packed = jax.lax.optimization_barrier((outs, values, codes, packed))
    return outs, (plan, values, codes, [packed.get(i, inputs[i]) for i in plan.inputs])

  def backward(residuals, cotangents):
    plan, *kept = residuals
    cotangents = [
      jnp.zeros(v.aval.shape, v.aval.dtype) if isinstance(g, SymbolicZero) else g
      for v, g in zip(jaxpr.outvars, cotangents, strict=True)
      if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
    (values, codes, inputs), cotangents = tied(kept, cotangents)
    values = {v: choice.values[v].unpack(p) for v, p in zip(plan.values, values, strict=True)}
    codes = dict(zip(plan.codes, codes, strict=True))
    inputs = {
      i: x if i < n_free or i not in plan.moved else choice.inputs[i].unpack(x)
      for i, x in zip(plan.inputs, inputs, strict=True)
    }
    filled = [inputs[i] if i in inputs else _nothing(v.aval) for i, v in enumerate(jaxpr.invars)]
    # All before any: a gradient of a weight that waits would keep what was computed again for it.
    grads = iter(
      jax.lax.optimization_barrier(_gradients(plan.moved, values, codes, filled, cotangents))
    )
    return tuple(next(grads) if i in plan.moved else None for i in range(len(jaxpr.invars)))

  def _gradients(moved, values, codes, inputs, cotangents):
    """The gradients of inputs `moved`; a value or code that is not there is one that they do not
    need.
    """

    def stand_in(v):
      def value(computed, read):
        kept = values.get(v)
        if v in choice.codes:
          source, t = choice.codes[v]
          code = codes[v] if v in codes else _nothing(_code_of(choice.codes[v]))
          slope = look_up(unpack(code, v.aval.shape, bits_of(t)), t.levels)
          return _sloped(read(source), _nothing(v.aval) if kept is None else kept, slope)
        return computed if kept is None else _given(computed, kept)

      return value

    at = {v: stand_in(v) for v in choice.values}

    def outputs(*xs):
      filled = list(inputs)
      for i, x in zip(moved, xs, strict=True):
        filled[i] = x
      outs = _evaluate(jaxpr, filled, at)
      return [outs[i] for i in floats]

    _, vjp = jax.vjp(outputs, *(inputs[i] for i in moved))
    return vjp(cotangents)

  @functools.cache
  def _needed(moved) -> _Plan:
    """What a live equation of the backward program reads, of all that may be kept."""
    values, codes = list(choice.values), list(choice.codes)

    def program(values_, codes_, inputs, cotangents):
      return _gradients(
        moved,
        dict(zip(values, values_, strict=True)),
        dict(zip(codes, codes_, strict=True)),
        inputs,
        cotangents,
      )

    avals = (
      [v.aval for v in values],
      [_code_of(choice.codes[v]) for v in codes],
      [v.aval for v in jaxpr.invars],
      [jaxpr.outvars[i].aval for i in floats],
    )
    found = jax.make_jaxpr(program)(
      *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), avals)
    ).jaxpr
    live = set(variables(found.outvars))
    for eqn in reversed(found.eqns):
      if live & set(eqn.outvars):
        live.update(variables(eqn.invars))
    used = iter([v in live for v in found.invars])
    pick = lambda names: tuple(name for name in names if next(used))
    values, codes, inputs = pick(values), pick(codes), pick(range(len(jaxpr.invars)))
    return _Plan(moved, values, codes, inputs)

  run.defvjp(forward, backward, symbolic_zeros=True)
  return run


def _nothing(aval):
  return jnp.zeros(aval.shape, aval.dtype)


def _code_of(activation: tuple[Any, Table]):
  source, t = activation
  return jax.eval_shape(lambda: pack(jnp.zeros(source.aval.shape, jnp.uint8), bits_of(t)))
