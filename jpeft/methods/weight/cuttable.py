"""Low-rank products beside kernels whose inputs fall into equal parts that may be left out.

The parts are heads, for the projection behind attention, and hidden units, for the second layer of
an MLP. For a kernel w [fan_in, fan_out], a [fan_in, r], b [r, fan_out] and k [fan_in], one number
a part:

  w' = k (w + s a b)        y' = (k x) w + s (k x) a b

A part with k = 0 adds nothing to the output, so that it may be cut off the model: `Weight.cuts`
names k. Of grouped queries a part is a key head with its group.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Leaf, Site, Weight

from ..nn import drop, uniform
from .lora import required

KEPT = 'kept'
LINEAR = '{q}|{k}|{v}|{o}|{fc1}|{fc2}'
HEADS = '{o}'
UNITS = '{fc2}'


@dataclasses.dataclass(frozen=True)
class LowRank:
  """The rule; `t` of a kernel has a and b, k, or all three.

  Attributes:
    name: in theta.
    scale: s.
    dropout: rate on what enters a.
  """

  name: str
  scale: float
  dropout: float = 0.0

  def rule(self, init: Callable, **options) -> Weight:
    """The Weight with an `init`; `options` are further fields of it."""
    needs = required(self.dropout)
    return Weight(self.name, init, self.weights, self.product, requires=needs, cuts=KEPT, **options)

  def weights(self, t: Mapping, site: Site, arrays) -> dict:
    made = {}
    for array, own in t.items():
      leaf = site.leaves[array]
      w = leaf.fold(arrays[array])
      if 'a' in own:
        w = w + (self.scale * (own['a'] @ own['b'])).astype(w.dtype)
      if KEPT in own:
        w = w * by_input(own[KEPT], leaf.fan_in).astype(w.dtype)[:, None]
      made[array] = leaf.unfold(w)
    return made

  def product(self, t: Mapping, x, y, w, key) -> jax.Array:
    if not t:
      return y
    (own,) = t.values()
    if KEPT in own:
      # The kernel is read again in the backward pass: one in 4 bits is not stored decoded.
      @jax.checkpoint
      def of_parts(v, kept):
        return x.map(lambda _: masked(v, kept, x.fan_in)) @ w()

      y = of_parts(x.x, own[KEPT])
      x = x.map(lambda v: masked(v, own[KEPT], x.fan_in))
    if 'a' not in own:
      return y
    low = x.map(lambda v: drop(v, key, self.dropout)) @ own['a']
    return y + self.scale * (low @ own['b'])


def by_input(kept: jax.Array, fan_in: int) -> jax.Array:
  """k of each input [fan_in], from that of each part."""
  return jnp.repeat(kept, fan_in // kept.shape[-1], axis=-1, total_repeat_length=fan_in)


def masked(x: jax.Array, kept: jax.Array, fan_in: int) -> jax.Array:
  """k x, for what a layer is called with: its last axes are the inputs of the kernel."""
  axes = trailing(x.shape, fan_in)
  return x * by_input(kept, fan_in).reshape(x.shape[-axes:]).astype(x.dtype)


def trailing(shape: tuple[int, ...], size: int) -> int:
  """How many of the last axes of a shape have so many numbers together.

  Raises:
    ValueError: none.
  """
  for axes in range(1, len(shape) + 1):
    if math.prod(shape[-axes:]) == size:
      return axes
  raise ValueError(f'the last axes of an array {list(shape)} are not the {size} inputs of a layer')


def as_rows(x: jax.Array, size: int) -> jax.Array:
  """x [..., *axes] whose last axes have `size` numbers together, as [..., size]."""
  return x.reshape(*x.shape[: x.ndim - trailing(x.shape, size)], size)


def start(key, leaf: Leaf, rank: int) -> dict[str, jax.Array]:
  """a and b as LoRA starts them."""
  a = uniform(key, (leaf.fan_in, rank), leaf.fan_in**-0.5)
  return {'a': a, 'b': jnp.zeros((rank, leaf.fan_out))}


def kernel_of(name: str, site: Site) -> str:
  """The name of the one kernel of a layer.

  Raises:
    ValueError: it has none, several, or one for each expert.
  """
  if len(site.matrices) == 1 and not site.leaves[site.matrices[0]].batch:
    return site.matrices[0]
  raise ValueError(
    f'{name} at {site.path!r}: parts are cut off layers with one kernel, and {site.kind} has '
    f'{", ".join(site.leaves)}'
  )


def parts_of(name: str, site: Site) -> int:
  """How many parts the inputs of a layer have; 0 where none is cut off.

  Raises:
    ValueError: nothing shows how many heads there are.
  """
  if is_one_of(site, UNITS):
    return site.leaves[kernel_of(name, site)].fan_in
  if is_one_of(site, HEADS):
    return heads_of(name, site)
  return 0


def heads_of(name: str, site: Site) -> int:
  """The key heads of the attention that a layer is a part of."""
  around = enclosing(site, '{attention}')
  heads = site.model[around].heads if around is not None else None
  if heads is None:
    raise ValueError(
      f'{name} at {site.path!r}: heads are counted where an attention module calls its own '
      'attention_fn, and none around this layer does'
    )
  return heads[0]


def enclosing(site: Site, pattern: str) -> str | None:
  """The innermost module of a pattern that a layer is or lies in."""
  found = [
    path
    for path in (other.owner for other in site.model.find(pattern))
    if site.owner == path or site.owner.startswith(f'{path}/')
  ]
  return max(found, key=len, default=None)


def is_one_of(site: Site, pattern: str) -> bool:
  """Whether a pattern names a layer."""
  return any(site.path == other.path for other in site.model.find(pattern))


# Which layers share the parts of which.


def groups_of(sites: Mapping[str, Site]) -> dict[str, list[str]]:
  """{path of a layer whose inputs are cut: the layers of `sites` that share its parts}."""
  around: dict[Any, list[str]] = {}
  for path, site in sites.items():
    around.setdefault(_owner_of_parts(site), []).append(path)
  groups = {}
  for members in around.values():
    for path in members:
      if path in cut_paths(sites[path]):
        groups[path] = members
  return groups


def cut_paths(site: Site) -> set[str]:
  """The layers of the model whose inputs are cut; of the others that share parts, the outputs."""
  return {other.path for other in site.model.find(f'{HEADS}|{UNITS}')}


def is_between(site: Site, first: int, last: int) -> np.ndarray:
  """Whether a layer is neither one of the first so many nor of the last, [*stack]."""
  numbers = site.choose(np.asarray(0 if site.number is None else site.number))
  return np.asarray((numbers >= first) & (numbers < site.depth - last))


def _owner_of_parts(site: Site) -> tuple[str, str | None]:
  """What the parts of a layer belong to: heads to an attention, hidden units to a block."""
  pattern = '{block}' if is_one_of(site, f'{{fc1}}|{UNITS}') else '{attention}'
  return pattern, enclosing(site, pattern)
