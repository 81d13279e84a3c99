"""Which axis of a kernel is cut over the model axis of a mesh, by its role."""

import math
from collections.abc import Iterable, Sequence

from jpeft.core import Leaf, Site, Sites
from jpeft.quant import Quantized

_BY_COLUMNS = ('q', 'k', 'v', 'fc1', 'head')
_BY_ROWS = ('o', 'fc2')
_OF_HEADS = ('q', 'k', 'v', 'o')
_CODES_BY_ROWS = (
  'cut by columns, as rows of 4-bit codes cannot be cut: what they read and return is gathered'
)


class ModelAxis:
  """Decides for each array of a model which of its axes is cut in `parts` parts."""

  def __init__(self, sites: Sites, parts: int, whole_below: int):
    """Reads the roles of the model's arrays.

    Args:
      sites: of the model.
      parts: devices along the model axis.
      whole_below: arrays with fewer numbers in one layer are whole.
    """
    self.parts = parts
    self.whole_below = whole_below
    # {(path, name of an array): role}; none of arrays that several roles share.
    self._roles: dict[tuple[str, str], str] = {}
    self._attentions: list[Site] = []
    roles = {} if sites.anatomy is None else sites.anatomy.roles
    for role in (*_BY_COLUMNS, *_BY_ROWS):
      for site in sites.find(f'{{{role}}}') if role in roles else ():
        for name in site.matrices:
          if name not in site.slices:
            self._roles[site.owner, name] = role
    if 'attention' in roles:
      self._attentions = [site for site in sites.find('{attention}') if site.heads is not None]
    # {path of an attention module: query heads times their size}, where a layer alone makes these.
    self._widths: dict[str, int] = {}
    for (path, name), role in self._roles.items():
      if role == 'q':
        self._widths[path.rpartition('/')[0]] = sites[path].leaves[name].fan_out

  def is_cut(self, shape: Sequence[int]) -> bool:
    """Whether an array of one layer is cut: a matrix or more, and large enough.

    A vector is small, and what it scales or shifts would be cut as it is.
    """
    return len(shape) > 1 and math.prod(shape) >= self.whole_below

  def of_array(self, site: Site, name: str) -> tuple[int | None, str]:
    """(the axis of one layer's array that is cut, why it is none or not that of its role).

    The axis is None for an array that is whole.
    """
    leaf = site.leaves[name]
    if self.parts == 1 or not self.is_cut(leaf.shape):
      return None, ''
    role = self._roles.get((site.path, name))
    splits = self._split_heads(site, role)
    wanted = _wanted_axis(leaf, role)
    if wanted is not None and leaf.shape[wanted] % self.parts == 0 and not splits:
      return wanted, ''
    # A part of a head is of no use to attention; of rows the products are added up.
    axes = leaf.ins if splits else range(len(leaf.shape))
    axis = largest(leaf.shape, axes, self.parts)
    if axis is None:
      return None, f'whole, as model={self.parts} divides none of their axes'
    if splits and role != 'o':
      return axis, f'cut by rows, as model={self.parts} does not divide {splits}'
    return axis, ''

  def of_codes(self, site: Site, box: Quantized) -> tuple[bool, str]:
    """(whether a 4-bit kernel is cut by its columns, why not or what that costs)."""
    leaf = box.leaf
    if self.parts == 1 or not self.is_cut(leaf.shape):
      return False, ''
    if not by_columns(box, self.parts):
      return False, f'whole, as model={self.parts} does not divide the columns of their codes'
    name = site.matrices[0]
    role = self._roles.get((site.path, name))
    if role in _BY_ROWS:
      return True, _CODES_BY_ROWS
    splits = self._split_heads(site, role)
    if splits:
      return True, f'gathered after the product, as model={self.parts} does not divide {splits}'
    return True, ''

  def attentions(self) -> tuple[list[Site], list[Site]]:
    """(the modules whose query heads can be cut, those where `parts` does not divide these)."""
    cut = []
    whole = []
    for site in self._attentions:
      where = whole if self._heads(site, 'q') % self.parts else cut
      where.append(site)
    return cut, whole

  def _split_heads(self, site: Site, role: str | None) -> str:
    """Which heads columns of a projection would be parts of, as far as is known; '' for none."""
    if role not in _OF_HEADS:
      return ''
    for attention in self._attentions:
      if site.path.startswith(f'{attention.path}/') or site.path == attention.path:
        if self._heads(attention, 'q') % self.parts:
          return 'the heads'
        return 'the key heads' if self._heads(attention, role) % self.parts else ''
    return 'the heads'

  def _heads(self, attention: Site, role: str) -> int:
    """The heads that a projection of an attention module makes or reads."""
    count, size = attention.heads
    if role in ('k', 'v'):
      return count
    return self._widths.get(attention.path, count * size) // size


def _wanted_axis(leaf: Leaf, role: str | None) -> int | None:
  """The axis of one layer's array that its role names."""
  if leaf.use == 'gather':  # a table of words
    return 0
  if role in _BY_ROWS and leaf.ins:
    return leaf.ins[0]
  if role is not None and leaf.outs:
    return leaf.outs[0]
  return None


def largest(shape: Sequence[int], axes: Iterable[int], parts: int) -> int | None:
  """The largest of some axes that can be cut in `parts` parts; None if there is none."""
  fit = [axis for axis in axes if shape[axis] % parts == 0]
  return max(fit, key=shape.__getitem__, default=None)


def by_columns(box: Quantized, parts: int) -> bool:
  """Whether a 4-bit kernel can be cut in `parts` parts by its columns."""
  return box.columns['codes'] is not None and box.leaf.fan_out % parts == 0
