"""theta of a method, entry by entry and layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jpeft.core import Rule, Site, Tuned, Weight

from .peft_names import Arrays, layers_of


def entries(theta: Mapping) -> Iterator[tuple[str, str, str, Any]]:
  """(name of a rule, site path, name of an array, what theta has of it)."""
  for name, sites in theta.items():
    for path, arrays in sites.items():
      for array, values in arrays.items():
        yield name, path, array, values


def chosen_keys(keys: Sequence[str], name: str, path: str, tuned: Tuned | None) -> Sequence[str]:
  """The names of the layers in which the method acts, of those of all layers."""
  if tuned is None:
    return keys
  chosen = tuned.site_of(name, path).chosen
  if chosen is None:
    return keys
  return [keys[i] for i in chosen]


def check_layers(values, stacked: bool, keys: Sequence[str], path: str) -> None:
  """Raises a ValueError if theta has other layers than those that are written."""
  if not stacked:
    return
  count = len(jax.tree.leaves(values)[0])
  if count != len(keys):
    raise ValueError(
      f'theta has {count} layers for {path!r}, and the model {len(keys)}: of a method in some '
      'layers (layers=) give tuned='
    )


def each_layer(values: Any, arrays: Arrays, where: str) -> list[Any]:
  """theta of single layers of an array."""
  place, _ = arrays.places[where]
  if not isinstance(values, Mapping):
    return layers_of(values, place)
  split = {part: layers_of(x, place) for part, x in values.items()}
  count = len(next(iter(split.values())))
  return [{part: layers[i] for part, layers in split.items()} for i in range(count)]


def rule_of(tuned: Tuned, name: str, path: str) -> tuple[Weight, Site]:
  """The rule of a name at a site."""
  found: Rule | None = None
  for rule, site in tuned.rules:
    if (rule.name, site.path) == (name, path):
      found = rule
      break
  if not isinstance(found, Weight) or found.outer:
    raise ValueError(
      f'{name!r} at {path!r} is no change of weights alone: an adapter folder holds LoRA or DoRA'
    )
  return found, site
