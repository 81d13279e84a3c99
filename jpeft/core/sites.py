"""Where a method may act: the modules of a model, as one traced forward pass shows them."""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MATRIX_USES = ('dot_general', 'conv_general_dilated')


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array that a site owns, as a single layer sees it (stacking axes removed).

  Attributes:
    shape: of one layer's array.
    dtype: as stored.
    use: the primitive that consumes it first: dot_general, conv_general_dilated, gather, mul, ...
    ins: its axes that are contracted with the activation.
    batch: its axes that are batched with the activation (one matrix per expert, say).
    offset: what is added to it before that use: 1 for norms that store scale - 1.
  """

  shape: tuple[int, ...]
  dtype: Any
  use: str = 'unused'
  ins: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  offset: float = 0.0

  @property
  def is_matrix(self) -> bool:
    return self.use in MATRIX_USES and bool(self.ins)

  @property
  def fan_in(self) -> int:
    return math.prod(self.shape[i] for i in self.ins)

  @property
  def fan_out(self) -> int:
    return math.prod(self.shape[i] for i in self.outs)

  @property
  def outs(self) -> tuple[int, ...]:
    return tuple(i for i in range(len(self.shape)) if i not in self.ins + self.batch)

  def fold(self, w: jax.Array) -> jax.Array:
    """The kernel as the matrix [*batch, fan_in, fan_out] that it stands for."""
    batch = [self.shape[i] for i in self.batch]
    return w.transpose(self.batch + self.ins + self.outs).reshape(*batch, self.fan_in, -1)

  def unfold(self, m: jax.Array, outs: tuple[int, ...] | None = None) -> jax.Array:
    """The inverse of `fold`; `outs` replaces the sizes of the output axes (for a narrower
    matrix).
    """
    order = self.batch + self.ins + self.outs
    outs = tuple(self.shape[i] for i in self.outs) if outs is None else outs
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return m.reshape([self.shape[i] for i in self.batch + self.ins] + list(outs)).transpose(inverse)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
  """A module of the user's model.

  Attributes:
    path: its '/'-joined path; '' is the model itself.
    kind: the name of its class.
    leaves: the arrays it owns, by name.
    inputs: shapes and dtypes of the arrays it is called with, by parameter name.
    out: shape and dtype of the first array it returns; None when it is never called.
    fields: the injection points it offers: dot_general, einsum_op, conv_general_dilated,
      attention_fn.
    axes: the axes that scans and vmaps around it added to its arrays, outermost first; arrays of
      theta lead with them instead.
    lengths: the sizes of those axes.
    heads: (key/value heads, head size) where the module calls its own `attention_fn`.
    module: an unbound copy of a Linen module, for side networks that reuse its class.
    methods: the names of its methods that the forward pass calls.
    boxes: what stands for one layer's arrays where the backbone holds boxes, as shapes.
    model: all sites.
  """

  path: str
  kind: str
  leaves: dict[str, Leaf]
  inputs: dict[str, jax.ShapeDtypeStruct]
  out: jax.ShapeDtypeStruct | None
  fields: tuple[str, ...]
  axes: tuple[int, ...]
  lengths: tuple[int, ...]
  heads: tuple[int, int] | None
  module: Any
  methods: tuple[str, ...]
  boxes: dict[str, Any]
  model: 'Sites' = dataclasses.field(repr=False)

  @property
  def input(self) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of the first array it is called with; None when it is never called."""
    return next(iter(self.inputs.values()), None)

  @property
  def matrices(self) -> list[str]:
    """The names of its kernels: what is multiplied with, or convolved over, an activation."""
    return [name for name, leaf in self.leaves.items() if leaf.is_matrix]

  @property
  def layers(self) -> int:
    """How many layers the site stands for: the size of its stack."""
    return math.prod(self.lengths)

  def lead(self, x: jax.Array) -> jax.Array:
    """A stored array, with its stacking axes moved to the front."""
    return jnp.moveaxis(x, self.axes, range(len(self.axes))) if self.axes else x

  def place(self, x: jax.Array) -> jax.Array:
    """The inverse of `lead`; an array of too few axes for it gets axes of one behind."""
    if not self.axes:
      return x
    missing = max(0, *(a + 1 - x.ndim for a in self.axes))
    return jnp.moveaxis(x.reshape(x.shape + (1,) * missing), range(len(self.axes)), self.axes)

  def take(self, x: jax.Array, index: int) -> jax.Array:
    """One layer of an array stored at the site or in it; an array that is not stacked as it is."""
    if not self.axes or x.ndim < len(self.axes):
      return x
    return self.lead(x)[np.unravel_index(index, self.lengths)]

  def each(self, x: jax.Array) -> jax.Array:
    """All layers of an array stored at the site or in it, [layers, ...]; one that is not stacked is
    repeated.
    """
    if x.ndim < len(self.axes):
      return jnp.broadcast_to(x, (self.layers, *x.shape))
    led = self.lead(x)
    return led.reshape(self.layers, *led.shape[len(self.axes) :])

  def per_layer(self, fn):
    """vmaps `fn` over the leading stack axes of all its arguments."""
    for _ in self.axes:
      fn = jax.vmap(fn)
    return fn


class Sites(dict[str, Site]):
  """Path -> Site, in the order of the forward pass; finds sites by pattern or role."""

  anatomy: Any = None

  def expand(self, pattern: str) -> str:
    """Replaces roles such as {q} or {block} by the anatomy's patterns."""

    def role(match: re.Match) -> str:
      if self.anatomy is None:
        some = ', '.join(list(self)[:8])
        raise ValueError(
          f'{pattern!r} uses the role {match[0]}, and no known anatomy fits this model: give a regex '
          f'over its paths ({some}, ...), or describe the model by jpeft.register_anatomy(...)'
        )
      return f'(?:{self.anatomy.role(match[1])})'

    return re.sub(r'\{([a-z]\w*)\}', role, pattern)

  def find(self, pattern: str) -> list[Site]:
    """The sites whose whole path matches."""
    expanded = re.compile(self.expand(pattern))
    return [site for path, site in self.items() if expanded.fullmatch(path)]

  def nearest(self, pattern: str, n: int = 5) -> list[str]:
    """Paths that look like the pattern, for error messages."""
    words = re.sub(r'[^\w/]+', ' ', pattern).strip() or pattern
    paths = [p for p in self if p]
    return difflib.get_close_matches(words, paths, n, 0.2) or paths[:n]


def stack_axes(
  outer: Sequence[tuple[int, ...]], inner: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
  """The axes that lifting added, from the stored shapes and those that one call of the layer sees.

  One lift adds the same axis to every array of a module, so the answer is what all the arrays
  agree on; where shapes leave a choice, the leading axes, as all practice has it.

  Args:
    outer: the shapes as stored.
    inner: the shapes as the module sees them inside its call, in the same order.

  Raises:
    ValueError: no choice of axes explains the shapes.
  """
  common: set[tuple[int, ...]] | None = None
  for whole, part in zip(outer, inner, strict=True):
    found = set(_removals(whole, part))
    common = found if common is None else common & found
  if not common:
    raise ValueError(f'cannot tell which axes of {list(outer)} are stacked layers of {list(inner)}')
  return min(common, key=lambda axes: ([a < 0 for a in axes], axes))


def _removals(whole: tuple[int, ...], part: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
  """Every set of axes of `whole` (counted from the front, or all from the back) that leaves
  `part`.
  """
  for axes in itertools.combinations(range(len(whole)), len(whole) - len(part)):
    if tuple(n for i, n in enumerate(whole) if i not in axes) == tuple(part):
      yield axes
      if axes:
        yield tuple(a - len(whole) for a in axes)
