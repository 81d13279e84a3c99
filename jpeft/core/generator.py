"""Theta as a function of a smaller tree: what is trained is not what the rules read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.messages import did_you_mean

from .paths import leaf_paths
from .sites import Site


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
  """What a rule reads at one site.

  Attributes:
    site: where.
    t: the entries, as the rule's own `init` makes them; in `expand` as shapes. In a stack they lead
      with its layers.
  """

  site: Site
  t: Any

  @property
  def numbers(self) -> np.ndarray | int | None:
    """The number of the layer, of a stack those of its layers; None outside of layers."""
    number = self.site.number
    if number is None or not self.site.axes:
      return number
    return np.asarray(self.site.choose(number))

  def per_layer(self, fn: Callable) -> Callable:
    """vmaps a function of one layer over the layers of a stack, in all its arguments."""
    return self.site.per_layer(fn)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """How the theta of a method follows from a smaller tree.

  Attributes:
    init: (key, {path: Place}) -> the smaller tree, see `generated`.
    expand: (the smaller tree, {path: Place of shapes}) -> {path: entries}.
    fixed: entries of the smaller tree that are not trained.
  """

  init: Callable[..., Any]
  expand: Callable[..., Any]
  fixed: tuple[str, ...] = ()

  def start(self, name: str, key: jax.Array, places: Mapping[str, Place]) -> dict[str, Any]:
    """The smaller tree, {path, or '' for what belongs to no site: entries}.

    Raises:
      ValueError: `init` returns something else.
    """
    made = self.init(key, places)
    where = f'init of generated {name!r}'
    if not isinstance(made, Mapping) or not all(isinstance(t, Mapping) for t in made.values()):
      raise ValueError(f"{where} must return {{path: dict of arrays}}, with '' for what is shared")
    for path, t in made.items():
      if path and path not in places:
        hint = did_you_mean(path, places)
        raise ValueError(f'{where} returns entries for {path!r}, where no rule of it acts{hint}')
      if path:
        _check_stack(where, path, places[path].site, t)
    return jax.tree.map(jnp.asarray, {path: dict(t) for path, t in made.items()})

  def expanded(self, name: str, t: Mapping[str, Any], places: Mapping[str, Place]) -> dict:
    """{path: entries} as the rules read them.

    Raises:
      ValueError: `expand` returns other entries, or of other shapes.
    """
    made = self.expand(t, places)
    found = leaf_paths({path: made[path] for path in made})
    wanted = leaf_paths({path: place.t for path, place in places.items()})
    for entry in sorted(found.keys() ^ wanted.keys()):
      problem = 'lacks' if entry in wanted else 'returns'
      raise ValueError(
        f'expand of generated {name!r} {problem} {entry!r}; its rules read {", ".join(wanted)}'
      )
    for entry, shape in wanted.items():
      if jnp.shape(found[entry]) != shape.shape:
        raise ValueError(
          f'expand of generated {name!r} makes {entry!r} of shape {jnp.shape(found[entry])}, and '
          f'its rule reads {shape.shape}'
        )
    return jax.tree.map(
      lambda x, like: jnp.asarray(x, like.dtype), dict(made), {p: v.t for p, v in places.items()}
    )


def _check_stack(where: str, path: str, site: Site, t) -> None:
  for entry, x in leaf_paths(t).items():
    lengths = site.theta_lengths
    if jnp.shape(x)[: len(lengths)] != lengths:
      raise ValueError(
        f'{where} returns {entry!r} of shape {jnp.shape(x)} for {path!r}, a stack of layers '
        f'{lengths}, which have to come first'
      )
