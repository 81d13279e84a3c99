"""What the compiler is told inside of layers on a mesh of devices, as rules of a method.

Where kernels are cut, the stream of each block, and what {o} and {fc2} add to it, is cut by
examples and by nothing else: the compiler could as well cut it by features, and gather it at each
norm. Attention in long contexts is cut by heads: it would let each device compute all. And 4-bit
kernels that are cut over the data axis are gathered as codes: it could as well decode them first.

Where the tokens of a row are cut, the stream is cut by them too, and so are the queries of all
attention in long contexts, that of side networks included.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.core import NO_BACKPROP, Call, Rule, Site, Tuned, Weight, heads_over
from jpeft.quant import Quantized

from .model_axis import ModelAxis
from .sharding import token_parts

# For a 4-bit kernel and the axes of the mesh that cut its columns, the shardings of its arrays.
OfColumns = Callable[[Quantized, tuple[str, ...]], dict[str, NamedSharding]]


@dataclasses.dataclass(frozen=True)
class Steering:
  """The rules of a layout.

  Attributes:
    mesh, backbone: see `Layout`.
    model: how kernels are cut over the model axis.
    of_columns: where the arrays of a 4-bit kernel are.
  """

  mesh: Mesh
  model: ModelAxis
  backbone: str
  of_columns: OfColumns

  def rules(self, tuned: Tuned) -> list[tuple[Rule, Site]]:
    """The rules for a method, with their sites."""
    rules: list[tuple[Rule, Site]] = []
    roles = ['block']
    if token_parts(self.mesh) > 1:
      attends = Call('steered', self._attends_by_tokens, memory=NO_BACKPROP)
      rules.append((attends, tuned.sites['']))
      roles.append('norm')
    if self.mesh.shape['model'] > 1:
      roles += ['norm', 'o', 'fc2']
    for role in dict.fromkeys(roles):
      rules += [(self._stream(site, role), site) for site in steered_sites(tuned, role)]
    if self.backbone != 'replicated' and self.mesh.shape['model'] > 1:
      attends = Call('steered', self._attends, memory=NO_BACKPROP)
      rules += [(attends, site) for site in self.model.attentions()[0]]
    if self.backbone == 'fsdp':
      codes = Weight('gathered', _nothing, self._gathered, memory=NO_BACKPROP)
      rules += [(codes, site) for site in tuned.sites.values() if _has_codes(site)]
    return rules

  # ---- The stream.

  def _stream(self, site: Site, role: str) -> Call:
    """A rule by which the stream that a module reads and returns is cut by examples and tokens.

    It raises a ValueError in a block whose tokens cannot be cut.
    """
    coded = [box for box in site.boxes.values() if isinstance(box, Quantized)]
    by_columns = any(self.model.of_codes(site, box)[0] for box in coded)

    def constrained(x, *cut):
      where = NamedSharding(self.mesh, PartitionSpec(*cut))
      return jax.lax.with_sharding_constraint(x, where)

    def placed(x):
      if x.ndim < 2 or x.shape[0] % self.mesh.shape['data']:
        return x
      return constrained(x, 'data', self._over_tokens(site, role, x))

    def returned(x):
      if by_columns and x.shape[0] % self.mesh.shape['data'] == 0:
        # First as its kernel is, which would else be gathered in place of this.
        between = [None] * (x.ndim - 2)
        if between:
          between[0] = self._over_tokens(site, role, x)
        x = constrained(x, 'data', *between, 'model')
      return placed(x)

    def apply(t, call, *args, **kwargs):
      if role in ('block', 'norm') and args and hasattr(args[0], 'shape'):
        args = (placed(args[0]), *args[1:])
      return call.site.map_stream(call(*args, **kwargs), returned)

    return Call('steered', apply, memory=NO_BACKPROP)

  def _over_tokens(self, site: Site, role: str, x: jax.Array) -> str | None:
    """The axis of the mesh that cuts the tokens of a stream [B, N, ...]; None for none.

    Raises:
      ValueError: it cuts them, and does not divide those of a block.
    """
    parts = token_parts(self.mesh)
    if parts == 1 or x.ndim < 3:
      return None
    length = x.shape[1]
    if length % parts == 0:
      return 'sequence'
    if role == 'block':
      raise ValueError(
        f'mesh.sequence={parts} does not divide the {length} tokens that the block {site.path!r} '
        'reads: choose a data.max_length that it divides together with the tokens that the model '
        'or the method adds'
      )
    return None

  # ---- Attention.

  def _attends(self, t, call, *args, **kwargs):
    with heads_over(self.mesh, 'data', 'model', 'sequence'):
      return call(*args, **kwargs)

  def _attends_by_tokens(self, t, call, *args, **kwargs):
    with heads_over(self.mesh, 'data', None, 'sequence'):
      return call(*args, **kwargs)

  # ---- 4-bit kernels.

  def _gathered(self, t, site: Site, arrays) -> dict[str, Any]:
    """The 4-bit kernels of a site, cut over the model axis alone."""
    found = {}
    for name, layer in site.boxes.items():
      if not isinstance(layer, Quantized):
        continue
      box = arrays.stored(name)
      names: tuple[str, ...] = ()
      if self.model.of_codes(site, layer)[0]:
        names = ('model',)
      where = self.of_columns(box, names)
      placed = jax.tree.map(jax.lax.with_sharding_constraint, box.arrays, where)
      found[name] = dataclasses.replace(box, arrays=placed)
    return found


def steered_sites(tuned: Tuned, role: str) -> list[Site]:
  """The modules of a role whose stream can be told where it is."""
  anatomy = tuned.sites.anatomy
  if anatomy is None or role not in anatomy.roles:
    return []
  found = tuned.sites.find(f'{{{role}}}')
  return [site for site in found if not site.part and site.out is not None]


def _has_codes(site: Site) -> bool:
  return any(isinstance(box, Quantized) for box in site.boxes.values())


def _nothing(key, site, arrays) -> dict:
  return {}
