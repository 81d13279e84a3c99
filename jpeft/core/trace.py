"""How each parameter is used, read off the jaxpr: no framework, no table of layer types."""

from typing import NamedTuple

import jax
from jax.extend import core as jex

# Primitives through which an array stays recognisably itself, axis by axis.
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


class Use(NamedTuple):
  """The first use of an array; axes are counted in the array as stored."""

  primitive: str = 'unused'
  ins: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  scanned: tuple[int, ...] = ()
  offset: float = 0.0


class _Seen(NamedTuple):
  name: str
  dims: tuple[tuple[int, ...], ...]  # for every current axis: the stored axes it came from
  scanned: tuple[int, ...] = ()
  offset: float = 0.0  # a constant that was added on the way


def uses(fn, params: dict, *rest) -> dict[str, Use]:
  """The first use of each array of the flat dict `params` in fn(params, *rest)."""
  jaxpr, found = jax.make_jaxpr(fn)(params, *rest).jaxpr, {}
  names = sorted(params)
  whole = [tuple((i,) for i in range(v.aval.ndim)) for v in jaxpr.invars[: len(names)]]
  env = {v: _Seen(n, d) for v, n, d in zip(jaxpr.invars, names, whole, strict=False)}
  _walk(jaxpr, env, found)
  return found


def _walk(jaxpr, env: dict, found: dict[str, Use]) -> None:
  for eqn in jaxpr.eqns:
    ins = [None if isinstance(v, jex.Literal) else env.get(v) for v in eqn.invars]
    if not any(ins):
      continue
    name, p = eqn.primitive.name, eqn.params
    if name == 'scan':
      first, body = p['num_consts'] + p['num_carry'], p['jaxpr'].jaxpr
      steps = [_sliced(t) if t and i >= first else t for i, t in enumerate(ins)]
      _enter(body, steps, found)
    elif name == 'while':
      n = p['cond_nconsts']
      m = n + p['body_nconsts']
      _enter(p['cond_jaxpr'].jaxpr, [*ins[:n], *ins[m:]], found)
      _enter(p['body_jaxpr'].jaxpr, ins[n:], found)
    elif subs := _sub_jaxprs(p, len(ins)):  # jit, remat, custom_jvp, cond
      for sub in subs:
        inner = _enter(sub, ins[len(ins) - len(sub.invars) :], found)
        pairs = zip(eqn.outvars, sub.outvars, strict=False)
        env |= {o: inner[i] for o, i in pairs if not isinstance(i, jex.Literal) and i in inner}
    else:
      hit = next(t for t in ins if t)
      moved = _moved(eqn, ins, hit)
      if moved is not None:
        env[eqn.outvars[0]] = hit._replace(dims=moved, offset=hit.offset + _added(eqn))
        continue
      for t, (axes, batch) in zip(ins, _roles(name, p, len(ins)), strict=True):
        if t:
          stored = lambda dims, t=t: tuple(sorted({a for i in dims for a in t.dims[i]}))
          found.setdefault(t.name, Use(name, stored(axes), stored(batch), t.scanned, t.offset))


def _enter(jaxpr, ins, found) -> dict:
  env = {v: t for v, t in zip(jaxpr.invars, ins, strict=False) if t}
  _walk(jaxpr, env, found)
  return env


def _sub_jaxprs(params: dict, arity: int) -> list:
  leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, jex.Jaxpr))
  subs = [getattr(s, 'jaxpr', s) for s in leaves]
  return [s for s in subs if isinstance(s, jex.Jaxpr) and len(s.invars) <= arity]


def _sliced(t: _Seen) -> _Seen:
  return t._replace(dims=t.dims[1:], scanned=(*t.scanned, *t.dims[0]))


def _added(eqn) -> float:
  """The constant c of w + c and w - c."""
  sign = {'add': 1, 'sub': -1}.get(eqn.primitive.name, 0)
  constants = (
    [float(v.val) for v in eqn.invars[sign < 0 :] if isinstance(v, jex.Literal)] if sign else []
  )
  return sign * constants[0] if constants else 0.0


def _roles(name: str, p: dict, n: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """For every operand: its axes that a primitive sums over (or looks up), and its batch axes."""
  dims = p.get('dimension_numbers')
  if name == 'dot_general':
    (left, right), (left_batch, right_batch) = dims
    return [(left, left_batch), (right, right_batch)]
  if name == 'conv_general_dilated':
    return [((), ()), (dims.rhs_spec[1:], ())]
  if name == 'gather':
    return [(dims.collapsed_slice_dims, ())] + [((), ())] * (n - 1)
  return [((), ())] * n


def _moved(eqn, ins, hit: _Seen) -> tuple[tuple[int, ...], ...] | None:
  """Where the axes go under a primitive that only moves or scales data; None for any other."""
  name, p, dims = eqn.primitive.name, eqn.params, hit.dims
  at = next(i for i, t in enumerate(ins) if t)
  shape = eqn.invars[at].aval.shape
  if name in _SAME:
    return dims
  if (
    name in _ELEMENTWISE
    and shape
    and all(not v.aval.shape for v, t in zip(eqn.invars, ins, strict=True) if t is None)
  ):
    return dims  # w * 2, 1 + scale: still the same array for whoever asks what it multiplies
  if name == 'transpose':
    return tuple(dims[i] for i in p['permutation'])
  if name == 'squeeze':
    return tuple(d for i, d in enumerate(dims) if i not in p['dimensions'])
  if name == 'broadcast_in_dim':
    into = dict(zip(p['broadcast_dimensions'], dims, strict=True))
    return tuple(into.get(i, ()) for i in range(len(p['shape'])))
  return _reshaped(shape, p['new_sizes'], dims) if name == 'reshape' else None


def _reshaped(shape, sizes, dims) -> tuple[tuple[int, ...], ...] | None:
  """Axes kept, new axes of one, or old axes merged; None where an axis is split."""
  out, i = [], 0
  for size in sizes:
    merged, got = (), 1
    while got < size and i < len(shape):
      merged, got, i = merged + dims[i], got * shape[i], i + 1
    if got != size:
      return None
    out.append(merged)
  return tuple(out)
