"""Where a method may act: the modules of a model, as one traced forward pass shows them."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .boxes import read

# A role in a pattern.
_ROLE = r'\{([a-z]\w*)\}'
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
    direct: whether it is consumed itself, moved at most; else scaled, masked, normalised or joined
      with other arrays before.
  """

  shape: tuple[int, ...]
  dtype: Any
  use: str = 'unused'
  ins: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  offset: float = 0.0
  direct: bool = True

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
    ordered = w.transpose(self.batch + self.ins + self.outs)
    return ordered.reshape(*batch, self.fan_in, -1)

  def unfold(self, m: jax.Array, outs: tuple[int, ...] | None = None) -> jax.Array:
    """The inverse of `fold`.

    Args:
      m: [*batch, fan_in, fan_out].
      outs: sizes of the output axes; those of the kernel by default, others for a narrower matrix.
    """
    if outs is None:
      outs = tuple(self.shape[i] for i in self.outs)
    leading = [self.shape[i] for i in self.batch + self.ins]
    order = self.batch + self.ins + self.outs
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return m.reshape([*leading, *outs]).transpose(inverse)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
  """A module of the user's model, or a part of one that a role names.

  Attributes:
    path: its '/'-joined path; '' is the model itself. That of a part ends with ':' and the role.
    kind: the name of its class.
    leaves: the arrays it owns, by name; of a part those that belong to it, as it sees them.
    inputs: shapes and dtypes of the arrays it is called with, by parameter name.
    sources: {parameter name: path of the module whose output it is}, for inputs that come straight
      from another module.
    out: shape and dtype of the stream that it returns; None when it is never called. The stream is
      the array that a later module is called with first; else the first array that is shaped as
      what the module is called with first; else the first array.
    out_path: where in the output the stream is: a path of `jax.tree_util`.
    fields: the injection points it offers: dot_general, einsum_op, conv_general_dilated,
      attention_fn.
    axes: the axes that scans and vmaps around it added to its arrays, outermost first; in arrays of
      theta they come first instead.
    lengths: the sizes of those axes.
    heads: (key/value heads, head size) where rules reach its attention: it calls its own
      `attention_fn`, or its family has its inline form.
    module: an unbound copy of a Linen module, for side networks that reuse its class.
    methods: the names of its methods that the forward pass calls.
    boxes: what stands for one layer's arrays where the backbone holds boxes, as shapes.
    model: all sites.
    numbers: of the model's layers that the site stands for, one a layer of its stack; empty outside
      of numbered layers.
    depth: how many layers there are in all, of which these are numbers.
    chosen: positions in the stack where a rule acts (`layers=`); None for all of them. Its theta
      has entries for these alone.
    inline: whether it computes attention inline, and `Anatomy.attention` stands in for it.
    inline_fault: why `Anatomy.attention` does not serve it; '' if it does, or there is none.
    part: the role by which a part of a module was asked for; '' for a whole module.
    slices: {array: (axis, slice or indices)} of the arrays that a part has a slice of.
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
  numbers: tuple[int, ...] = ()
  depth: int = 0
  chosen: tuple[int, ...] | None = None
  out_path: tuple[Any, ...] = ()
  sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
  inline: bool = False
  inline_fault: str = ''
  part: str = ''
  slices: Mapping[str, tuple[int, Any]] = dataclasses.field(default_factory=dict)

  # ---- Parts of a module.

  @property
  def owner(self) -> str:
    """The path of the module that stores the arrays: its own, without the role of a part."""
    return self.path.removesuffix(f':{self.part}') if self.part else self.path

  def narrow(self, name: str, x):
    """What a part has of one layer's array of its module; arrays that are not cut as they are."""
    if name not in self.slices:
      return x
    return read(x)[self._index(name)]

  def widen(self, name: str, x, new):
    """The array of the module with `new` in place of what the part has of it."""
    if name not in self.slices:
      return new
    x = jnp.asarray(read(x))
    return x.at[self._index(name)].set(read(new).astype(x.dtype))

  def columns(self, name: str) -> Any:
    """Which columns of the folded kernel of the module a part has: a slice, or indices."""
    if name not in self.slices:
      return slice(None)
    axis, index = self.slices[name]
    leaf = self.model[self.owner].leaves[name]
    numbers = np.arange(leaf.fan_out).reshape([leaf.shape[i] for i in leaf.outs])
    before = (slice(None),) * leaf.outs.index(axis)
    return _as_slice(numbers[(*before, index)].reshape(-1))

  def _index(self, name: str) -> tuple:
    axis, index = self.slices[name]
    return (*(slice(None),) * axis, index)

  # ---- What it returns.

  def stream(self, out) -> jax.Array:
    """The stream in an output of the module, which may hold caches or losses beside it."""
    leaves = jax.tree_util.tree_leaves_with_path(out)
    return leaves[self._stream_index(leaves)][1]

  def map_stream(self, out, fn):
    """An output of the module with fn(stream) in place of the stream."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(out)
    index = self._stream_index(leaves)
    values = [x for _, x in leaves]
    values[index] = fn(values[index])
    return jax.tree.unflatten(tree, values)

  def _stream_index(self, leaves) -> int:
    for i, (path, _) in enumerate(leaves):
      if path == self.out_path:
        return i
    return 0  # of another structure than in the traced call

  # ---- Arrays and their stacks.

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

  def stack_first(self, x: jax.Array) -> jax.Array:
    """A stored array with its stacking axes moved to the front: [*lengths, ...]."""
    if not self.axes:
      return x
    return jnp.moveaxis(x, self.axes, range(len(self.axes)))

  def stack_restore(self, x: jax.Array) -> jax.Array:
    """The inverse of `stack_first`.

    An array with too few axes to have the stacking axes in their place gets axes of one behind.
    """
    if not self.axes:
      return x
    missing = max(0, *(axis + 1 - x.ndim for axis in self.axes))
    padded = x.reshape(x.shape + (1,) * missing)
    return jnp.moveaxis(padded, range(len(self.axes)), self.axes)

  def take(self, x: jax.Array, index: int) -> jax.Array:
    """One layer of an array stored at the site or in it; one that is not stacked as it is."""
    if not self.axes or x.ndim < len(self.axes):
      return x
    return self.stack_first(x)[np.unravel_index(index, self.lengths)]

  def each(self, x: jax.Array) -> jax.Array:
    """All layers of an array stored at the site or in it, [layers, ...].

    An array that is not stacked is repeated.
    """
    if x.ndim < len(self.axes):
      return jnp.broadcast_to(x, (self.layers, *x.shape))
    stacked = self.stack_first(x)
    return stacked.reshape(self.layers, *stacked.shape[len(self.axes) :])

  # ---- Theta: entries for the chosen layers, the stack first.

  @property
  def theta_lengths(self) -> tuple[int, ...]:
    """The leading axes of theta's arrays: those of the stack, or one of the chosen layers."""
    if self.chosen is None:
      return self.lengths
    return (len(self.chosen),)

  def per_layer(self, fn):
    """vmaps `fn` over the leading axes of theta in all its arguments."""
    for _ in self.theta_lengths:
      fn = jax.vmap(fn)
    return fn

  def choose(self, x: jax.Array) -> jax.Array:
    """The chosen layers of an array of all: [*lengths, ...] -> [*theta_lengths, ...]."""
    if self.chosen is None:
      return x
    layers = x.reshape(self.layers, *x.shape[len(self.lengths) :])
    return layers[np.array(self.chosen)]

  def spread(self, x: jax.Array) -> jax.Array:
    """An array of all layers, with that of a chosen layer in those that are not chosen."""
    if self.chosen is None:
      return x
    source = np.zeros(self.layers, int)
    source[list(self.chosen)] = np.arange(len(self.chosen))
    return x[source].reshape(*self.lengths, *x.shape[1:])

  def replace_chosen(self, x: jax.Array, new: jax.Array) -> jax.Array:
    """An array of all layers with other values in the chosen ones, `new` [*theta_lengths, ...]."""
    if self.chosen is None:
      return new
    layers = x.reshape(self.layers, *x.shape[len(self.lengths) :])
    return layers.at[np.array(self.chosen)].set(new).reshape(x.shape)

  def of_layer(self, x: jax.Array, number) -> jax.Array:
    """What an array as theta has it, the chosen layers first, has for one layer by its number."""
    x = jnp.asarray(x)
    if not self.axes:
      return x
    numbers = jnp.asarray(self.choose(jnp.asarray(self.number)).reshape(-1))
    layers = x.reshape(len(numbers), *x.shape[len(self.theta_lengths) :])
    return layers[jnp.searchsorted(numbers, number)]

  def one_layer(self, x: jax.Array, number) -> jax.Array:
    """What an array [chosen layers, ...] has for a layer, by its number."""
    x = jnp.asarray(x)
    if not self.axes:
      return x[0]
    return self.of_layer(x.reshape(*self.theta_lengths, *x.shape[1:]), number)

  @property
  def number(self) -> np.ndarray | int | None:
    """The number of the layer; of a stack [*lengths]; None outside of layers."""
    numbers = self.numbers or tuple(range(self.layers))
    if self.axes:
      return np.array(numbers, np.int32).reshape(self.lengths)
    return self.numbers[0] if self.numbers else None

  @property
  def active(self) -> np.ndarray:
    """Whether each layer is chosen, [*lengths]."""
    active = np.zeros(self.layers, bool)
    active[list(self.chosen if self.chosen is not None else range(self.layers))] = True
    return active.reshape(self.lengths)


class Sites(dict[str, Site]):
  """Path -> Site, in the order of the forward pass; finds sites by pattern or role.

  Attributes:
    families: the naming schemes that fit the model about as well, the likeliest first.
    arrays: {'path/name': shape, or box of shapes} of all arrays of the backbone.
    takes_boxes: whether arrays may be computed where the model reads them. A model that maps over
      its parameters (`nn.WeightNorm`) gets new arrays instead, computed before it runs.
    aliases: {'path/name': 'path/name' by which the same array is known} of an array that several
      modules own (NNX).
  """

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.families: list[Any] = []
    self.arrays: dict[str, Any] = {}
    self.aliases: dict[str, str] = {}
    self.takes_boxes = True
    self._parts: dict[str, Site] = {}

  @property
  def anatomy(self) -> Any:
    """The naming scheme that fits the model; None without one."""
    return self.families[0] if self.families else None

  @property
  def causal(self) -> bool:
    """Whether a token sees only the tokens before it, by the model's family.

    Raises:
      ValueError: families that differ in this fit about as well.
    """
    for other in self.families[1:]:
      if other.causal != self.anatomy.causal:
        raise ValueError(
          f'the paths of this model fit the families {self.anatomy.name!r} and {other.name!r} '
          'about as well, which differ in what a token sees: describe the model by '
          'jpeft.register_anatomy'
        )
    return self.anatomy is not None and self.anatomy.causal

  @property
  def lead(self) -> int:
    """How many special tokens stand before the others, by the model's family.

    Of families that fit about as well it is the most: what a head reads stays in its place.
    """
    return max((anatomy.lead for anatomy in self.families), default=0)

  def expand(self, pattern: str, of_role: Callable[[str], str] | None = None) -> str:
    """Replaces roles such as {q} or {block} by the anatomy's patterns.

    Args:
      pattern: a regex with roles.
      of_role: role -> its pattern; by default that of the modules that it names, or names parts of.
    """

    def role(match: re.Match) -> str:
      if self.anatomy is None:
        some = ', '.join(list(self)[:8])
        raise ValueError(
          f'{pattern!r} uses the role {match[0]}, and no known anatomy fits this model: give a '
          f'regex over its paths ({some}, ...), or describe the model by '
          'jpeft.register_anatomy(...)'
        )
      return f'(?:{(of_role or self.anatomy.role)(match[1])})'

    return re.sub(_ROLE, role, pattern)

  def of_role(self, role: str) -> list[Site]:
    """The sites of a role; none where the model is of no family, or its family has no such role."""
    if self.anatomy is None or role not in self.anatomy.roles:
      return []
    return self.find(f'{{{role}}}')

  def find(self, pattern: str) -> list[Site]:
    """The sites whose whole path matches.

    Of a module that a role names a part of it is that part: a Site of its own, with the arrays
    that belong to the role.

    Raises:
      ValueError: no role may leave out a part of a module: what else is of it would be adapted.
    """
    expanded = re.compile(self.expand(pattern))
    cuts = self._cuts(pattern)
    if not cuts:
      return [site for path, site in self.items() if expanded.fullmatch(path)]
    whole = re.compile(self.expand(pattern, self.anatomy.modules))
    found = []
    for path, site in self.items():
      if whole.fullmatch(path):
        if not expanded.fullmatch(path):
          raise ValueError(
            f'{pattern!r} leaves out a part of {path!r}, and would name all of it: name what is '
            'meant instead'
          )
        found.append(site)
        continue
      for role, parts in cuts.items():
        here = [part for part, regex in parts if regex.fullmatch(path)]
        if here:
          found += self._part(site, role, here)
    return found

  def _cuts(self, pattern: str) -> dict[str, list[tuple[Any, re.Pattern]]]:
    """{role: (part, the pattern with this part alone)} of the roles that name parts of modules."""
    cuts: dict[str, list[tuple[Any, re.Pattern]]] = {}
    for role in roles_of(pattern):
      for part in self.anatomy.parts(role):

        def of_role(name, role=role, part=part):
          return part.path if name == role else self.anatomy.modules(name)

        cuts.setdefault(role, []).append((part, re.compile(self.expand(pattern, of_role))))
    return cuts

  def _part(self, site: Site, role: str, parts: list) -> list[Site]:
    """The part of a module that a role names, the same each time; none if it has no such arrays."""
    path = f'{site.path}:{role}'
    if path not in self._parts:
      leaves = {}
      slices = {}
      for part in parts:
        for name, leaf in site.leaves.items():
          if name in leaves or not re.fullmatch(part.array, name):
            continue
          leaves[name] = leaf
          if part.take is not None:
            axis, index, size = _cut(part, site, name, role)
            shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
            leaves[name] = dataclasses.replace(leaf, shape=shape)
            slices[name] = axis, index
      boxes = {name: box for name, box in site.boxes.items() if name in leaves.keys() - slices}
      self._parts[path] = dataclasses.replace(
        site, path=path, part=role, leaves=leaves, slices=slices, boxes=boxes
      )
    found = self._parts[path]
    if not found.slices and len(found.leaves) == len(site.leaves):
      return [site]
    return [found] if found.leaves else []

  def nearest(self, pattern: str, n: int = 5) -> list[str]:
    """Paths that look like the pattern, for error messages."""
    words = re.sub(r'[^\w/]+', ' ', pattern).strip() or pattern
    paths = [path for path in self if path]
    return difflib.get_close_matches(words, paths, n, 0.2) or paths[:n]


def roles_of(pattern: str) -> list[str]:
  """The roles in a pattern, in order."""
  return list(dict.fromkeys(re.findall(_ROLE, pattern)))


def overlap(a: Site, b: Site, name: str) -> bool:
  """Whether two sites of one module have entries of an array in common."""
  if name not in a.slices or name not in b.slices:
    return True
  axis, one = a.slices[name]
  other_axis, other = b.slices[name]
  if axis != other_axis:
    return True
  numbers = np.arange(a.model[a.owner].leaves[name].shape[axis])
  return bool(np.intersect1d(numbers[one], numbers[other]).size)


def _cut(part, site: Site, name: str, role: str) -> tuple[int, Any, int]:
  """(axis, slice or indices, how many they are) of the slice of an array that a role names.

  Raises:
    ValueError: the array has no such axis or entries.
  """
  leaf = site.leaves[name]
  where = f'the role {{{role}}} takes a part of {name!r} at {site.path!r}'
  if part.axis >= len(leaf.outs):
    raise ValueError(
      f'{where}, whose output has {len(leaf.outs)} axes, and not axis={part.axis}: name the arrays '
      'that are cut by Part(..., array=)'
    )
  axis = leaf.outs[part.axis]
  size = leaf.shape[axis]
  if callable(part.take):
    numbers = np.arange(size)[part.take(site, size)]
  else:
    index, count = part.take
    if size % count:
      raise ValueError(f'{where}, whose {size} outputs are not {count} equal pieces')
    numbers = np.arange(size)[size // count * index : size // count * (index + 1)]
  if not len(numbers):
    raise ValueError(f'{where}, and takes none of its {size} outputs')
  return axis, _as_slice(numbers), len(numbers)


def _as_slice(numbers: np.ndarray) -> Any:
  """The same as a slice, where numbers follow each other at one distance."""
  step = 1
  if len(numbers) > 1:
    step = int(numbers[1] - numbers[0])
  if step < 1 or np.any(np.diff(numbers) != step):
    return numbers
  return slice(int(numbers[0]), int(numbers[-1]) + 1, step)
