"""x @ w + delta through a layer's own injection point, so that no gradient of w is ever formed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .blame import blame
from .boxed import multiplied
from .boxes import Box, Reader
from .context import check_scalars
from .entries import cast
from .injection import PRODUCTS, inject
from .merging import changed
from .products import Operand, product_of, rows_operand
from .rules import Weight
from .sites import Site


def field_of(site: Site) -> str | None:
  """The injection point through which the site's only kernel is applied; None without one."""
  fields = [field for field in PRODUCTS if field in site.fields]
  module = site.model[site.owner]
  if not site.model.takes_boxes or not fields or not site.matrices or len(module.matrices) != 1:
    return None
  kernel = site.leaves[site.matrices[0]]
  # A kernel that is masked or scaled before the product is not what the layer multiplies by.
  if not kernel.direct:
    return None
  # Of a stack of matrices there is a field for a stack of one axis, one matrix a tile of rows.
  if kernel.batch and (len(kernel.batch) > 1 or fields[0] != 'grouped_dot'):
    return None
  return fields[0]


def fused(
  rules: Sequence[tuple[Weight, Site, Any, Any]],
  site: Site,
  module,
  call,
  key,
  box: Box | None = None,
) -> Callable:
  """The call of a layer with `rules` applied to y = x @ w instead of w.

  Args:
    rules: (rule, own site, t, active) in order; each rule has `dot`, and gets the columns of y that
      belong to its site, which may be a part of the module. Where `active`, a traced bool, is not
      None, the rule acts in some layers of a stack, and it says whether in this one.
    site: where; `field_of(site)` is not None.
    module: the bound module.
    call: its call.
    key: for dropout, or None.
    box: the kernel, where the backbone stores a box: the backward pass computes it again.
  """
  field = field_of(site)
  (name,) = site.matrices
  operation = getattr(module, field) or PRODUCTS[field]
  used = []

  def replacement(*args, **kwargs):
    used.append(field)
    product = product_of(field, operation, site.leaves[name], *args, **kwargs)
    if box is None:
      out = operation(*args, **kwargs)
    else:
      out = multiplied(site, box, product, operation, field, *args, **kwargs)
    y = product.to_rows(out)
    # Arrays beside the kernel are boxed, so what `w` makes of them here is not used.
    arrays = {n: jnp.zeros(leaf.shape, leaf.dtype) for n, leaf in site.leaves.items()}
    arrays[name] = product.kernel
    for i, (rule, own, t, active) in enumerate(rules):
      t = cast(t, y.dtype, rule.exact)
      columns = own.columns(name)
      old = y[..., columns]
      with blame(rule, own, 'dot'):
        kernel = Kernel(own, name, arrays, plain=box is None and i == 0)
        dot = rule.dot
        if product.groups is not None and own.leaves[name].batch:
          dot = _of_tiles(dot, product.groups)
        new = dot(t, product.operand, old, kernel, _fold_in(key, i))
      if new.shape != old.shape:
        raise ValueError(
          f'dot of {rule.name!r} at {own.path!r} makes {new.shape} of an output {old.shape}'
        )
      new = _if_active(active, new.astype(out.dtype), old)
      y = y.at[..., columns].set(new) if own.part else new
      arrays = _After(rule, t, active, own, arrays)
    return product.from_rows(y, out.shape)

  def run(*args, **kwargs):
    with inject(module, **{field: replacement}):
      out = call(*args, **kwargs)
    if not used:
      raise ValueError(f'{site.kind} at {site.path!r} never used the {field} it offers')
    return out

  return run


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The `w` of `dot`: `w()` computes the matrix [fan_in, fan_out] as the rules before leave it.

  Attributes:
    site, name: of which array.
    arrays: those of the site, as the rules before leave them.
    plain: whether it is the backbone's own array. Else it is computed, from a box or by a rule
      before: that takes time and memory, and may have a gradient.
    group: which matrix of a stack; None where there is one.
  """

  site: Site
  name: str
  arrays: Mapping[str, Any]
  plain: bool
  group: Any = None

  def __call__(self) -> jax.Array:
    leaf = self.site.leaves[self.name]
    kernel = leaf.fold(self.site.narrow(self.name, self.arrays[self.name]))
    return kernel if self.group is None else kernel[self.group]


def _of_tiles(dot: Callable, groups: jax.Array) -> Callable:
  """A `dot` of one matrix, for tiles of rows that are multiplied by a matrix of a stack each.

  The entries of theta, which have one part a matrix, are small: each tile gets a copy of its own.
  A rule that reads `w` gets one matrix a tile too, which takes memory.

  Args:
    dot: of a rule with `by_matrix`.
    groups: [G], which matrix each tile is multiplied by.
  """

  def run(t, x: Operand, y, w: Kernel, key):
    keys = None if key is None else jax.random.split(key, len(groups))

    def tile(t, x, y, group, key):
      return dot(t, rows_operand(x), y, dataclasses.replace(w, group=group), key)

    own = jax.tree.map(lambda entry: entry[groups], t)
    return jax.vmap(tile)(own, x.x, y, groups, keys)

  return run


def _fold_in(key, number: int):
  if key is None:
    return None
  return jax.random.fold_in(key, number)


class _After(dict):
  """The arrays as a rule leaves them, computed when a later rule reads them."""

  def __init__(self, rule: Weight, t, active, site: Site, before):
    super().__init__()
    self._before = before
    self._active = active

    def make():
      check_scalars(rule, site, t)
      return changed(rule.apply, t, site, Reader(before))

    self._make = make

  def __missing__(self, name):
    if not self:
      self.update(self._make())
    if name in self:
      return _if_active(self._active, self[name], self._before[name])
    return self._before[name]


def _if_active(active, new, old):
  """`new` in layers where a rule acts; all do where `active` is None."""
  if active is None:
    return new
  return jnp.where(active, new, old)
