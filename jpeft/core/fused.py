"""x @ w + delta through a module's own injection point, so that no gradient of w is ever formed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .boxes import Box, Lazy
from .injection import PRODUCTS, inject
from .rules import Weight
from .sites import Leaf, Site


@dataclasses.dataclass(frozen=True)
class Operand:
  """What a kernel is applied to: `operand @ m` for any m [fan_in, k] gives [..., k].

  For a convolution that is the convolution by m, its rows ordered as the kernel's.
  """

  x: jax.Array
  multiply: Callable[[jax.Array, jax.Array], jax.Array]

  def __matmul__(self, m: jax.Array) -> jax.Array:
    return self.multiply(self.x, m.astype(self.x.dtype))

  def map(self, fn: Callable[[jax.Array], jax.Array]) -> 'Operand':
    """The same operand with fn(x) in place of x: dropout, a mask, a scale."""
    return dataclasses.replace(self, x=fn(self.x))


def field_of(site: Site) -> str | None:
  """The injection point through which the site's only kernel is applied, if it has one."""
  if len(site.matrices) != 1 or site.leaves[site.matrices[0]].batch:
    return None
  for field in PRODUCTS:
    if field in site.fields:
      return field
  return None


def fused(
  rules: Sequence[tuple[Weight, Any]], site: Site, module, call, key, box: Box | None = None
) -> Callable:
  """The call with `rules` applied to x @ w instead of w.

  Args:
    rules: (rule, t) in order; each rule has `dot`.
    site: where; `field_of(site)` is not None.
    module: the bound module.
    call: its call.
    key: for dropout, or None.
    box: the backbone's kernel, where that is a box: the backward pass computes it again.
  """
  field = field_of(site)
  (array,) = site.matrices
  leaf = site.leaves[array]
  base = getattr(module, field) or PRODUCTS[field]
  split = {'dot_general': _dot, 'einsum_op': _einsum, 'conv_general_dilated': _conv}[field]
  used = []

  def product(*args, **kwargs):
    used.append(field)
    x, kernel, to_rows, from_rows = split(base, leaf, *args, **kwargs)
    if box is None:
      out = base(*args, **kwargs)
    else:
      out = _recomputed(base, field, box, *args, **kwargs)
    y = to_rows(out)
    # Arrays beside the kernel are boxed: what `w` makes of them here is not used.
    arrays = {name: jnp.zeros(l.shape, l.dtype) for name, l in site.leaves.items()}
    arrays[array] = kernel
    for i, (rule, t) in enumerate(rules):
      t = _cast(t, y.dtype, rule.exact)
      own_key = None if key is None else jax.random.fold_in(key, i)
      w = _folded(leaf, arrays, array)
      y = rule.dot(t, x, y, w, own_key).astype(out.dtype)
      arrays = _After(rule, t, site, arrays)
    return from_rows(y, out.shape)

  def run(*args, **kwargs):
    with inject(module, **{field: product}):
      out = call(*args, **kwargs)
    if not used:
      raise ValueError(f'{site.kind} at {site.path!r} never used the {field} it offers')
    return out

  return run


def _folded(leaf: Leaf, arrays, name: str) -> Callable[[], jax.Array]:
  """() -> the kernel [fan_in, fan_out] as the rules so far leave it."""
  return lambda: leaf.fold(arrays[name])


def _recomputed(base, field: str, box: Box, *args, **kwargs):
  """base(*args) of a kernel that is a box: the backward pass keeps the box, not the kernel.

  The arrays of a box of the backbone get no gradient; the theta in a Lazy does.
  """
  i = 1 if field == 'einsum_op' else 0  # behind the text of the equation
  dtype = args[i + 1].dtype

  def product(x, box):
    kernel = box.unbox().astype(dtype)
    return base(*args[:i], x, kernel, *args[i + 2 :], **kwargs)

  if isinstance(box, Lazy):
    return jax.checkpoint(product)(args[i], box)
  spec = jax.ShapeDtypeStruct(args[i].shape, args[i].dtype)

  def forward(x, box):
    return product(x, box), box

  def backward(box, g):
    # Tied to the cotangent: XLA would else keep the kernel of the forward pass after all.
    box, g = jax.lax.optimization_barrier((box, g))
    (gradient,) = jax.linear_transpose(lambda x: product(x, box), spec)(g)
    return gradient, None

  run = jax.custom_vjp(product)
  run.defvjp(forward, backward)
  return run(args[i], box)


class _After(dict):
  """The arrays as a rule leaves them, computed when a later rule asks."""

  def __init__(self, rule, t, site, before):
    super().__init__()
    self._before, self._make = before, lambda: rule.apply(t, site, before)

  def __missing__(self, name):
    if not self:
      self.update(self._make())
    return self[name] if name in self else self._before[name]


def _cast(t, dtype, exact: tuple[str, ...]):
  def leaf(path, a):
    keep = any(getattr(k, 'key', None) in exact for k in path)
    return a if keep or not jnp.issubdtype(a.dtype, jnp.floating) else a.astype(dtype)

  return jax.tree_util.tree_map_with_path(leaf, t)


def _dot(base, leaf: Leaf, lhs, rhs, dims, *args, **kwargs):
  (left, right), (batch, _) = dims
  if batch:
    raise NotImplementedError('a dot_general with batch axes')
  # The rows of the folded kernel follow its own axes, whatever order the call names them in.
  axes = [a for _, a in sorted(zip(right, left, strict=True))]
  free = [i for i in range(lhs.ndim) if i not in left]

  def multiply(x, m):
    rows = jnp.transpose(x, (*free, *axes)).reshape(*(x.shape[i] for i in free), -1)
    return base(rows, m, (((rows.ndim - 1,), (0,)), ((), ())), *args, **kwargs)

  to_rows = lambda y: y.reshape(*y.shape[: len(free)], -1)
  return Operand(lhs, multiply), rhs, to_rows, lambda y, shape: y.reshape(shape)


def _einsum(base, leaf: Leaf, spec: str, lhs, rhs, *args, **kwargs):
  inputs, out = spec.replace(' ', '').split('->')
  left, right = inputs.split(',')
  ins, outs = (''.join(right[i] for i in axes) for axes in (leaf.ins, leaf.outs))
  free = ''.join(c for c in out if c not in outs)
  new = next(c for c in 'zyxwvutsrqponmlkjihgfedcba' if c not in spec)

  def multiply(x, m):
    m = m.reshape(*(leaf.shape[i] for i in leaf.ins), -1)
    return base(f'{left},{ins}{new}->{free}{new}', x, m, *args, **kwargs)

  def to_rows(y):
    y = jnp.einsum(f'{out}->{free}{outs}', y)
    return y.reshape(*y.shape[: y.ndim - len(outs)], -1)

  def from_rows(y, shape):
    y = y.reshape(*y.shape[:-1], *(leaf.shape[i] for i in leaf.outs))
    return jnp.einsum(f'{free}{outs}->{out}', y)

  return Operand(lhs, multiply), rhs, to_rows, from_rows


def _conv(base, leaf: Leaf, lhs, rhs, *args, **kwargs):
  dims = kwargs.get('dimension_numbers') or (args[4] if len(args) > 4 else None)
  dims = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dims)
  channel = dims.out_spec[1]
  multiply = lambda x, m: jnp.moveaxis(
    base(x, leaf.unfold(m, (m.shape[-1],)), *args, **kwargs), channel, -1
  )
  return (
    Operand(lhs, multiply),
    rhs,
    lambda y: jnp.moveaxis(y, channel, -1),
    lambda y, shape: jnp.moveaxis(y, -1, channel),
  )
