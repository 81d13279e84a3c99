"""The names by which peft finds the arrays of a backbone.

peft names what transformers holds in memory. Files keep the names of before transformers 5, which
calls some modules of ViTs otherwise; folders of both are read.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jpeft.core import Box
from jpeft.messages import nearest
from jpeft.models import T5, Place, Pretrained, family_of, keyed, shapes_of

NEW, OLD = 'transformers>=5', 'transformers<5'
NAMINGS = (NEW, OLD)
BASE = 'base_model.model.'  # before every key of a folder
UNWRAPPED = 'base_model.'  # the same of prompts and prefixes, which wrap no module
_TABLE = 'embed/embedding'  # the word table of models that can be tied


class Arrays:
  """The arrays of a backbone, by our paths and by the keys of peft.

  Attributes:
    pretrained: the backbone.
    table: the rows of its family.
    places: {path: (place, keys in one naming, one a layer)}; without those of experts.
    experts: the paths of experts' kernels, which transformers from 5 on has as one array of all
      experts, and peft adapts in another layout than that of linear layers.
  """

  def __init__(self, pretrained: Pretrained, naming: str = NEW):
    """Finds them.

    Args:
      pretrained: the backbone.
      naming: of `places`, one of NAMINGS.

    Raises:
      ValueError: there is no such naming.
    """
    if naming not in NAMINGS:
      raise ValueError(f'names={naming!r} is none of {", ".join(map(repr, NAMINGS))}')
    family = family_of(pretrained.config)
    self.pretrained = pretrained
    self.table = family.table(pretrained.model)
    self.places: dict[str, tuple[Place, list[str]]] = {}
    self.experts: set[str] = set()
    self._homes: dict[str, tuple[str, int]] = {}
    for place, keys in keyed(self.table, shapes_of(pretrained.model, family)):
      if place.experts is not None:
        self.experts.add(place.path)
        continue
      renamed = [self.table.in_memory(key) for key in keys]
      if _is_tower_alone(pretrained):
        renamed = [key.removeprefix(self.table.base) for key in renamed]
      self.places[place.path] = (place, renamed if naming == NEW else keys)
      for names in (keys, renamed):
        for layer, key in enumerate(names):
          self._homes[key.removeprefix(self.table.base)] = (place.path, layer)

  def home(self, key: str, where: Any) -> tuple[str, int]:
    """(our path, layer) of a key, with or without the prefix of a model with a head.

    Raises:
      ValueError: the backbone has no such array.
    """
    found = self._homes.get(key.removeprefix(self.table.base))
    if found is None:
      near = nearest(key.removeprefix(self.table.base), self._homes)
      hint = '' if near is None else f'; the nearest is {near!r}'
      raise ValueError(f'{where}: {key!r} has no place in this backbone{hint}')
    self.check_own_tensor(found[0], where)
    return found

  def check_own_tensor(self, path: str, where: Any) -> None:
    """Raises a ValueError for an array that is a part of a tensor, which peft adapts as a whole."""
    place, keys = self.places[path]
    if place.part is not None:
      raise ValueError(
        f'{where}: {path!r} is a part of {keys[0]!r}, which peft adapts as one matrix: adapter '
        'folders hold layers with a tensor of their own, such as targets={o}|{fc2}'
      )

  @functools.cached_property
  def tied(self) -> str | None:
    """The path of the word table where it is the head as well."""
    return _TABLE if getattr(self.pretrained.model, 'tied', False) else None

  @property
  def unread_table(self) -> str | None:
    """The path of a table that transformers keeps in a module that its model does not call.

    The stacks of its T5 have modules of their own around the same table, so that what peft puts on
    `shared` reaches nothing.
    """
    return _TABLE if isinstance(self.pretrained.model, T5) else None

  @property
  def copies(self) -> tuple[str, ...]:
    """The modules that in transformers hold the word table once more."""
    found: tuple[str, ...] = ()
    if isinstance(self.pretrained.model, T5):
      found = ('encoder.embed_tokens', 'decoder.embed_tokens')
    if self.tied is not None:
      found = (*found, 'lm_head')
    return found

  def owned(self, path: str) -> list[str]:
    """The arrays of the site that owns an array, by their names."""
    site = path.rpartition('/')[0]
    return [other.rpartition('/')[2] for other in self.places if other.rpartition('/')[0] == site]

  def layers(self, path: str) -> list[np.ndarray] | None:
    """The values of an array, one a layer; None where only shapes are known, or codes in 4 bits."""
    x = self.pretrained.variables['params']
    for part in path.split('/'):
      x = x[part]
    if isinstance(x, Box) or not hasattr(x, '__array__'):
      return None
    return layers_of(x, self.places[path][0])


def _is_tower_alone(pretrained: Pretrained) -> bool:
  """Whether transformers from 5 on has no module around the layers of this tower of images."""
  kind = pretrained.config['model_type']
  return kind.endswith('_vision_model') and getattr(pretrained.model, 'num_classes', None) is None


@dataclasses.dataclass(frozen=True)
class Fold:
  """Between the matrix that a kernel or table stands for and the tensors of peft.

  Attributes:
    place: of the array.
  """

  place: Place

  def theirs(self, part: str, x: np.ndarray) -> np.ndarray:
    """a [window * in, r], b [r, out] or m [out] as [r, in, *window], [out, r, 1 ...] or [out]."""
    window = self.place.shape[:-2]
    if part == 'a':
      x = x.reshape(*window, -1, x.shape[-1])  # [*window, in, r]
      return np.moveaxis(x, (-1, -2), (0, 1))
    if part == 'b':
      return x.T.reshape(*x.T.shape, *(1 for _ in window))
    return x

  def ours(self, part: str, x: np.ndarray) -> np.ndarray:
    """The inverse of `theirs`."""
    if part == 'a':
      return np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, len(x))
    if part == 'b':
      return x.reshape(x.shape[:2]).T
    return x.reshape(-1)


def module_of(key: str) -> str:
  """The module that an array belongs to, by its key."""
  return key.rpartition('.')[0]


def layers_of(x, place: Place) -> list[np.ndarray]:
  """The arrays of single layers."""
  if place.stacked:
    return list(np.asarray(x))
  return [np.asarray(x)]


def joined(layers: Sequence[np.ndarray], place: Place) -> np.ndarray:
  """The array of all layers; the inverse of `layers_of`."""
  if place.stacked:
    return np.stack(layers)
  return layers[0]
