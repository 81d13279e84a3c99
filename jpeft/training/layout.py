"""Which axes of a run's arrays are cut over a mesh of devices.

The compiler adds the communication that a cut asks for. The axes that stack layers are never cut:
a layer finds what it needs on its own.

  replicated   the backbone is whole on each device
  sharded      its kernels are cut over the model axis: {q}, {k}, {v} and {fc1} by columns, {o} and
               {fc2} by rows, so that a block adds up two activations (Megatron, arXiv 1909.08053),
               tables of words by words, and 4-bit kernels by columns
  fsdp         the same, and cut over the data and the sequence axis too: each layer is gathered
               where it is read (ZeRO, arXiv 1910.02054)

Theta and the state of its optimizer are cut over all devices whatever the backbone is. What has
fewer than `whole_below` numbers a layer is whole.

Over the sequence axis the tokens of a row are cut, and with them all that layers compute of each
token by itself. Attention in long contexts gathers keys and values, see `core.heads_over`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft import tasks
from jpeft.core import Box, Site, Tuned, backend_of
from jpeft.messages import few
from jpeft.quant import Quantized

from .model_axis import ModelAxis, by_columns, largest
from .sharding import idles_in_host, replicated, token_parts
from .steering import Steering, steered_sites
from .step import Forward

BACKBONES = ('replicated', 'sharded', 'fsdp')
# A MiB in float32: less is not worth a message of its own in each layer.
WHOLE_BELOW = 2**18

# For each axis of an array the axes of the mesh that it is cut over.
Cut = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the arrays of a run are.

  Attributes:
    tuned: the method attached to the model.
    mesh: with the axes 'data' and 'model', and 'sequence' if tokens are cut.
    backbone: one of BACKBONES.
    whole_below: arrays with fewer numbers in one layer are whole on each device.
  """

  tuned: Tuned
  mesh: Mesh
  backbone: str = 'replicated'
  whole_below: int = WHOLE_BELOW

  def of_backbone(self, variables) -> Any:
    """The shardings of the model's variables, or of shapes like them."""
    whole = replicated(self.mesh)
    if self.backbone == 'replicated':
      return jax.tree.map(lambda _: whole, variables)
    backend = backend_of(self.tuned.model)
    placed = {}
    for path, x in backend.arrays(self.tuned.model, variables).items():
      placed[path] = self._of_stored(path, x)
    tree = backend.replace(self.tuned.model, variables, placed)
    # What is no weight, such as statistics, is whole.
    return jax.tree.map(lambda x: x if isinstance(x, NamedSharding) else whole, tree)

  def of_state(self, state: Mapping[str, Any], offload: bool = False) -> dict:
    """The shardings of a training state.

    Args:
      state: from `state_shapes`.
      offload: the optimizer's part is in pinned host memory.
    """
    whole = replicated(self.mesh)
    cuts = {}
    for path, x in _leaves(state['theta']):
      cuts[path] = self._of_theta(path, x.shape)

    def of_optimizer(path, x):
      cut = self._of_moment(path, x.shape, cuts)
      return self._sharding(cut, 'pinned_host' if offload else None)

    shardings = {name: jax.tree.map(lambda _: whole, part) for name, part in state.items()}

    def of_theta(path, _, is_idle):
      memory = 'pinned_host' if is_idle and idles_in_host(self.mesh) else None
      return self._sharding(cuts[path], memory)

    is_idle = self.tuned.idle(state['theta'])
    shardings['theta'] = jax.tree_util.tree_map_with_path(of_theta, state['theta'], is_idle)
    if 'teacher' in state:
      shardings['teacher'] = jax.tree_util.tree_map_with_path(
        lambda path, _: self._sharding(cuts[path]), state['teacher']
      )
    shardings['optimizer'] = jax.tree_util.tree_map_with_path(of_optimizer, state['optimizer'])
    return shardings

  def check(self, batch: Mapping[str, Any]) -> None:
    """Raises a ValueError if the tokens of a batch are to be cut and cannot.

    Whether a method adds tokens is seen later, where its forward pass is traced.

    Args:
      batch: {name: array or shape}.
    """
    parts = self._tokens
    if parts == 1:
      return
    length = tasks.length_of(batch)
    if length is None:
      raise ValueError(
        f'mesh.sequence={parts} cuts rows of tokens, and this model reads no such rows: leave it '
        'out, and give its devices to mesh.data or mesh.model'
      )
    if length % parts:
      raise ValueError(
        f'mesh.sequence={parts} does not divide the {length} tokens of a row: '
        f'data.max_length={length // parts * parts or parts} would do'
      )

  def exceptions(self) -> list[str]:
    """What is not cut as its role says, kernels and heads, in sentences with the reasons."""
    if self.backbone == 'replicated':
      return []
    found: dict[str, list[str]] = {}
    arrays = backend_of(self.tuned.model).arrays(self.tuned.model, self.tuned.backbone)
    for path, x in arrays.items():
      site, name = self._owner(path)
      if isinstance(x, Quantized):
        why = self._model.of_codes(site, site.boxes[name])[1]
      else:
        why = self._model.of_array(site, name)[1]
      if why:
        found.setdefault(why, []).append(path)
    _, whole = self._model.attentions()
    if whole:
      why = f'each device attends for all heads, as model={self._model.parts} does not divide them'
      found[why] = [site.path for site in whole]
    return [f'{why}: {few(paths)}' for why, paths in found.items()]

  def token_exceptions(self) -> list[str]:
    """What is not known of how tokens are cut, or reads those of all devices, in sentences."""
    found = []
    if self._tokens > 1:
      cut = f'mesh.sequence={self._tokens}'
      if not steered_sites(self.tuned, 'block'):
        found.append(f'{cut}: the compiler alone places tokens, as no module is known as {{block}}')
      sorted_for = [path for path, site in self.tuned.sites.items() if 'grouped_dot' in site.fields]
      if sorted_for:
        found.append(f'{cut}: the tokens of all devices are sorted for {few(sorted_for)}')
    return found

  # ---- What a step reads.

  def forward(
    self, tuned: Tuned, training: bool, mode: Mapping[str, bool] | None = None
  ) -> Forward:
    """The forward pass of a method on the mesh, see `Forward`."""
    if self.mesh.size == 1:
      return Forward(tuned, training, mode)
    untuned = self.steered(tuned.only())
    return Forward(self.steered(tuned), training, mode, self.gather, untuned, self._tokens)

  def gather(self, theta) -> Any:
    """theta as a step reads it: what stands for no kernel is whole.

    It is small, and what the compiler makes of a product with parts of it would cut activations by
    their features. Kernels are gathered where they are multiplied by, one layer at a time.
    """
    whole = replicated(self.mesh)

    def leaf(path, x):
      if self._kernel_of(path, x.shape) is not None:
        return x
      return jax.lax.with_sharding_constraint(x, whole)

    return jax.tree_util.tree_map_with_path(leaf, theta)

  def steered(self, tuned: Tuned) -> Tuned:
    """The same method with what the compiler is told inside of layers, as rules before its own."""
    if self._tokens == 1 and not self._cuts_layers(tuned):
      return tuned
    steering = Steering(self.mesh, self._model, self.backbone, self._of_columns)
    return dataclasses.replace(tuned, rules=(*steering.rules(tuned), *tuned.rules))

  def _cuts_layers(self, tuned: Tuned) -> bool:
    """Whether arrays are cut that layers read: of the backbone, or kernels in theta."""
    if self.backbone != 'replicated':
      return True
    for path, x in _leaves(tuned.shapes):
      is_kernel = self._kernel_of(path, x.shape) is not None
      if is_kernel and any(self._of_theta(path, x.shape)):
        return True
    return False

  # ---- The backbone.

  def _of_stored(self, path: str, x) -> Any:
    """The sharding of a stored array; of a box those of its arrays, as a box."""
    site, name = self._owner(path)
    if isinstance(x, Quantized):
      return self._of_codes(site, site.boxes[name], x)
    if isinstance(x, Box):
      return jax.tree.map(lambda _: replicated(self.mesh), x)
    cut = self._of_kernel(site, name)
    return self._sharding(_in_place(cut, len(x.shape), site.axes))

  def _of_kernel(self, site: Site, name: str) -> Cut:
    """How an array of one layer is cut."""
    cut = self._over_model(site, name)
    shape = site.leaves[name].shape
    if self.backbone == 'fsdp' and self._model.is_cut(shape):
      self._add_data(cut, shape)
    return tuple(cut)

  def _over_model(self, site: Site, name: str) -> list[tuple[str, ...]]:
    """How an array of one layer is cut over the model axis."""
    cut: list[tuple[str, ...]] = [()] * len(site.leaves[name].shape)
    axis, _ = self._model.of_array(site, name)
    if axis is not None:
      cut[axis] = ('model',)
    return cut

  def _add_data(self, cut: list[tuple[str, ...]], shape: Sequence[int]) -> None:
    """Cuts over the data axis too: the largest of the other axes, else the same one further.

    And over the sequence axis, whose devices would hold the same.
    """
    free = [i for i, names in enumerate(cut) if not names]
    axis = largest(shape, free, self._parts(self._further))
    if axis is None:
      held = [i for i, names in enumerate(cut) if names]
      axis = largest(shape, held, self.mesh.size)
    if axis is not None:
      cut[axis] = (*cut[axis], *self._further)

  def _of_codes(self, site: Site, layer: Quantized, box: Quantized) -> Any:
    """The shardings of a 4-bit kernel: all its arrays are cut by the same columns, or none is.

    A row of codes is two rows of the kernel that lie far apart, so that rows would have to move
    between devices after decoding.
    """
    names: tuple[str, ...] = ()
    if self._model.of_codes(site, layer)[0]:
      names = ('model',)
    if self.backbone == 'fsdp' and self._model.is_cut(layer.leaf.shape):
      further = (*names, *self._further)
      if by_columns(layer, self._parts(further)):
        names = further
    return dataclasses.replace(box, arrays=self._of_columns(box, names))

  def _of_columns(self, box: Quantized, names: tuple[str, ...]) -> dict[str, NamedSharding]:
    """The shardings of the arrays of a 4-bit kernel whose columns are cut over axes of the mesh."""
    found = {}
    for key, x in box.arrays.items():
      cut: list[tuple[str, ...]] = [()] * len(x.shape)
      if box.columns[key] is not None:
        cut[box.columns[key]] = names
      found[key] = self._sharding(tuple(cut))
    return found

  # ---- Theta and its optimizer.

  def _of_theta(self, path, shape: tuple[int, ...]) -> Cut:
    """How an entry of theta is cut: as the kernel that it stands for, or over all devices."""
    site = self.tuned.site_of(path[0].key, path[1].key)
    stack = len(site.theta_lengths)
    inner = shape[stack:]
    name = self._kernel_of(path, shape)
    if name is None:
      # It may have stacks of its own, such as the layers of a side network, in front.
      return ((),) * stack + self._spread(inner, range(max(0, len(inner) - 2), len(inner)))
    if self.backbone == 'replicated':
      return ((),) * stack + self._spread(inner, range(len(inner)))
    cut = self._over_model(site, name)
    if self._model.is_cut(inner):
      self._add_data(cut, inner)
    return ((),) * stack + tuple(cut)

  def _kernel_of(self, path, shape: tuple[int, ...]) -> str | None:
    """The name of the array of the model that an entry of theta stands for; None for none."""
    if len(path) != 3:
      return None
    site = self.tuned.site_of(path[0].key, path[1].key)
    name = path[2].key
    if site.part or name not in site.leaves:
      return None
    if site.leaves[name].shape != shape[len(site.theta_lengths) :]:
      return None
    return name

  def _of_moment(self, path, shape: tuple[int, ...], cuts: Mapping) -> Cut:
    """How an array of the optimizer is cut: as its entry of theta, if it has its shape."""
    for start in range(len(path)):
      cut = cuts.get(path[start:])
      if cut is None:
        continue
      if len(cut) == len(shape) and _divides(self.mesh, cut, shape):
        return cut
      site = self.tuned.site_of(path[start].key, path[start + 1].key)
      stack = len(site.theta_lengths)
      if len(shape) <= stack or shape[:stack] != tuple(site.theta_lengths):
        break
      inner = shape[stack:]
      return ((),) * stack + self._spread(inner, range(len(inner)))
    return ((),) * len(shape)

  def _spread(self, shape: tuple[int, ...], axes: Iterable[int]) -> Cut:
    """One of some axes over all devices, or over as many as divide one."""
    axes = list(axes)
    cut: list[tuple[str, ...]] = [()] * len(shape)
    if self._model.is_cut(shape):
      every = (*self._further, 'model')
      sets = (itertools.combinations(every, count) for count in range(len(every), 0, -1))
      for names in itertools.chain.from_iterable(sets):
        axis = largest(shape, axes, self._parts(names))
        if axis is not None:
          cut[axis] = names
          break
    return tuple(cut)

  # ---- Both.

  @property
  def _tokens(self) -> int:
    """Devices that the tokens of a row are cut over."""
    return token_parts(self.mesh)

  @property
  def _further(self) -> tuple[str, ...]:
    """The axes over which copies of what the model axis cuts are alike."""
    return ('data', 'sequence') if self._tokens > 1 else ('data',)

  @functools.cached_property
  def _model(self) -> ModelAxis:
    return ModelAxis(self.tuned.sites, self.mesh.shape['model'], self.whole_below)

  def _owner(self, path: str) -> tuple[Site, str]:
    """(site, name) of the array at a path."""
    where, _, name = path.rpartition('/')
    return self.tuned.sites[where], name

  def _parts(self, names: Iterable[str]) -> int:
    """How many devices some axes of the mesh have."""
    return math.prod(self.mesh.shape[name] for name in names)

  def _sharding(self, cut: Cut, memory_kind: str | None = None) -> NamedSharding:
    spec = PartitionSpec(*(names or None for names in cut))
    return NamedSharding(self.mesh, spec, memory_kind=memory_kind)


def _leaves(tree) -> list:
  return jax.tree_util.tree_leaves_with_path(tree)


def _in_place(cut: Cut, ndim: int, stacked: Sequence[int]) -> Cut:
  """The cut of a stored array, from that of one layer."""
  stack = {axis % ndim for axis in stacked}
  own = iter(cut)
  return tuple(() if axis in stack else next(own) for axis in range(ndim))


def _divides(mesh: Mesh, cut: Cut, shape: Sequence[int]) -> bool:
  return all(
    size % math.prod(mesh.shape[name] for name in names) == 0
    for names, size in zip(cut, shape, strict=True)
  )
