"""What Light-PEFT keeps after its first phase, and the LoRA that goes on from there."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Found, Moved, Site

from ..ragged import Live, slots
from .cuttable import KEPT

# What is found, by kind and place: of the layers of 'path array', each led by its layers,
#   a [layers, fan_in, r], b [layers, r, fan_out]   as trained
#   ranks [layers, r]                               which stay, none where the LoRA goes
#   parts [layers, parts]                           which heads or hidden units stay
#   stack [layers]                                  positions in a stack; absent outside of one
_KINDS = ('a', 'b', 'ranks', 'parts', 'stack')


def rank_importance(t: Mapping, grads: Mapping) -> jax.Array:
  """|mean over inputs of a da| + |mean over outputs of b db| of each rank, [..., r]."""
  of_a = jnp.abs((t['a'] * grads['a']).mean(-2))
  of_b = jnp.abs((t['b'] * grads['b']).mean(-1))
  return of_a + of_b


def mean_of_later_half(history: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The means of scores over the second half of some updates; what is not finite counts as 0."""
  later = history[len(history) // 2 :]
  means = {}
  for key in later[0]:
    values = [np.nan_to_num(np.asarray(x[key]), nan=0.0, posinf=0.0, neginf=0.0) for x in later]
    means[key] = np.mean(values, 0)
  return means


def least(values: np.ndarray, share: float) -> np.ndarray:
  """True for what lies at or below a quantile along the last axis; of equal values the first.

  Never for all: the largest stays.

  Args:
    values: [..., n].
    share: the quantile; 0 for none.
  """
  n = values.shape[-1]
  if not share:
    return np.zeros(values.shape, bool)
  count = min(math.floor(share * (n - 1) + 1e-9) + 1, n - 1)
  places = np.argsort(np.argsort(values, -1, kind='stable'), -1, kind='stable')
  return places < count


def decided(
  learned: Mapping[str, Any],
  scores: Mapping[str, np.ndarray],
  sites: Mapping[str, Site],
  heads: Iterable[str],
  shares: Mapping[str, float],
) -> dict[str, np.ndarray]:
  """What stays, see the head of this file.

  Args:
    learned: theta of the first phase, {path: {array: entries}}.
    scores: {'module path': [...], 'rank path': [..., r]}.
    sites: {path: site}.
    heads: paths of the layers whose parts are heads; those of others are hidden units.
    shares: of 'heads', 'units', 'modules' and 'ranks' that go.
  """
  heads = set(heads)
  found: dict[str, np.ndarray] = {}
  masks: dict[str, np.ndarray] = {}
  ranks: dict[str, np.ndarray] = {}
  modules: dict[str, np.ndarray] = {}
  for path, arrays in learned.items():
    site = sites[path]
    ((array, t),) = arrays.items()
    place = f'{path} {array}'
    stack = len(site.theta_lengths)
    for entry in 'ab':
      found[f'{entry} {place}'] = _led(np.asarray(t[entry]), stack)
    ranks[place] = _led(scores[f'rank {path}'], stack)
    modules[place] = scores[f'module {path}'].reshape(-1)
    if KEPT in t:
      masks[place] = _led(np.asarray(t[KEPT]), stack)
    if site.axes:
      chosen = range(site.layers) if site.chosen is None else site.chosen
      found[f'stack {place}'] = np.array(chosen, np.int32)

  units = {place: m for place, m in masks.items() if place.rpartition(' ')[0] not in heads}
  for place, m in masks.items():
    if place not in units:
      found[f'parts {place}'] = ~least(m, shares['heads'])
  for place, gone in _together(units, shares['units']).items():
    gone[np.arange(len(gone)), units[place].argmax(-1)] = False
    found[f'parts {place}'] = ~gone

  modules_gone = _together(modules, shares['modules'])
  ranks_gone = _together(ranks, shares['ranks'])
  kept = {place: ~gone & ~modules_gone[place][:, None] for place, gone in ranks_gone.items()}
  if not any(x.any() for x in kept.values()):  # the ranks that stay are of modules that go
    place = max(modules, key=lambda place: modules[place].max())
    layer = modules[place].argmax()
    kept[place][layer, ranks[place][layer].argmax()] = True
  for place, x in kept.items():
    found[f'ranks {place}'] = x
  return found


def _led(x: np.ndarray, stack: int) -> np.ndarray:
  """An entry of theta as [layers, ...], of one layer where there is no stack."""
  return x.reshape(-1, *x.shape[stack:])


def _together(values: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
  """`least` over all values together, in their places."""
  if not values:
    return {}
  flat = least(np.concatenate([x.reshape(-1) for x in values.values()]), share)
  gone = {}
  start = 0
  for place, x in values.items():
    gone[place] = flat[start : start + x.size].reshape(x.shape).copy()
    start += x.size
  return gone


def told(found: Found) -> str:
  """How much is left of what."""
  parts = [x for key, x in found.items() if key.startswith('parts ')]
  ranks = [x for key, x in found.items() if key.startswith('ranks ')]
  cut = sum(int((~x).sum()) for x in parts)
  left = sum(int(x.any(-1).sum()) for x in ranks)
  return (
    f'prunes {cut:,} of {sum(x.size for x in parts):,} heads and hidden units, and trains {left} '
    f'of {sum(map(len, ranks))} low-rank products, {sum(int(x.sum()) for x in ranks)} ranks'
  )


def moved(found: Found, modules: Mapping[str, Moved]) -> dict[str, np.ndarray]:
  """What was found, for the narrow model: LoRA is cut as its kernel, no part is left to go."""
  places = {key.partition(' ')[2]: None for key in found if key.startswith('ranks ')}
  arrays = {place.rpartition(' ')[0]: place.rpartition(' ')[2] for place in places}
  made: dict[str, list] = {}
  for path, module in modules.items():
    for number, layer in enumerate(module.layers):
      if layer.path not in arrays:
        continue
      old = f'{layer.path} {arrays[layer.path]}'
      positions = found.get(f'stack {old}', np.zeros(1, np.int32)).tolist()
      if layer.layer not in positions:
        continue
      at = positions.index(layer.layer)
      a, b, ranks = (found[f'{kind} {old}'][at] for kind in ('a', 'b', 'ranks'))
      if layer.ins is not None:
        a = a[np.asarray(layer.ins)]
      if layer.outs is not None:
        b = b[:, np.asarray(layer.outs)]
      new = f'{path} {arrays[layer.path]}'
      for kind, x in {'a': a, 'b': b, 'ranks': ranks}.items():
        made.setdefault(f'{kind} {new}', []).append(x)
      if module.stacked:
        made.setdefault(f'stack {new}', []).append(np.int32(number))
  return {key: np.stack(layers) for key, layers in made.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class SecondPhase:
  """theta of the second phase; of stacks filled up, see `ragged`.

  Attributes:
    found: {path: {kind: array}}.
    arrays: {path: name of the kernel}.
  """

  found: Mapping[str, Mapping[str, np.ndarray]]
  arrays: Mapping[str, str]

  @classmethod
  def of(cls, found: Found) -> 'SecondPhase':
    by_path: dict[str, dict[str, np.ndarray]] = {}
    arrays = {}
    for key, x in found.items():
      kind, _, place = key.partition(' ')
      path, _, array = place.rpartition(' ')
      if kind in _KINDS:
        by_path.setdefault(path, {})[kind] = x
        arrays[path] = array
    return cls(by_path, arrays)

  def init(self, key, site: Site, arrays) -> dict:
    own = self.found.get(site.path)
    if own is None:
      return {}
    t = {}
    if own['ranks'].any():
      a, b = self._filled(site.path)
      t = {'a': site.one_layer(a, arrays.number), 'b': site.one_layer(b, arrays.number)}
    if 'parts' in own and not own['parts'].all():
      t[KEPT] = site.one_layer(own['parts'], arrays.number)
    return {self.arrays[site.path]: t} if t else {}

  def _filled(self, path: str) -> tuple[np.ndarray, np.ndarray]:
    """a [layers, fan_in, most ranks] and b of the ranks that stay; what fills up is 0."""
    own = self.found[path]
    most = int(own['ranks'].sum(-1).max())
    a = np.zeros((*own['a'].shape[:2], most), own['a'].dtype)
    b = np.zeros((len(a), most, own['b'].shape[-1]), own['b'].dtype)
    for layer, ranks in enumerate(own['ranks']):
      count = ranks.sum()
      a[layer, :, :count] = own['a'][layer][:, ranks]
      b[layer, :count] = own['b'][layer][ranks]
    return a, b

  def live(self) -> dict[str, Live]:
    """Where the numbers of each stack are trained."""
    live: dict[str, Any] = {}
    for path, own in self.found.items():
      if 'stack' in own and own['ranks'].any():
        counts = own['ranks'].sum(-1)
        layers, ranks = slots(np.repeat(np.arange(len(counts)), counts))
        array = self.arrays[path]
        live[path] = {
          f'{array}/a': (layers, slice(None), ranks),
          f'{array}/b': (layers, ranks),
        }
    return live
