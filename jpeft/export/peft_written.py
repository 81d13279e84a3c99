"""A folder that is to be written, compared with the rules it was made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.core import Site, Tuned, Weight

from .compare import check_outputs
from .peft_found import Folder, matrix_in
from .peft_matrices import Vectors, check_same
from .peft_names import Arrays
from .peft_prompts import taken_apart
from .peft_rules import as_rules
from .peft_theta import each_layer, entries, rule_of


def check_written(written: Folder, arrays: Arrays, theta: Mapping, tuned: Tuned) -> None:
  """Raises a ValueError unless a folder that is to be written says what the rules compute."""
  *_, rest = taken_apart(theta)
  drawn = set()  # (rule, shape) of the random pairs that were compared, on a whole matrix
  for name, path, array, values in entries(rest):
    rule, site = rule_of(tuned, name, path)
    where = f'{path}/{array}'
    place, _ = arrays.places[where]
    stored = matrix_in(written, where)
    chosen = tuned.site_of(name, path).chosen
    for i, t in enumerate(each_layer(values, arrays, where)):
      if stored is None:
        _check_trained(rule, site, array, t)
        continue
      # An unrolled block is a place of its own, whose only layer is 0.
      said = stored[chosen[i] if chosen is not None and place.stacked else i]
      if _draws(rule, said):
        if (name, place.shape) in drawn:
          continue
        drawn.add((name, place.shape))
        said = dataclasses.replace(said, whole=True)
      check_same(written.where, said, rule, site, array, t)


def _draws(rule: Weight, said: Any) -> bool:
  """Whether a rule of VeRA draws a pair for each shape, so that no smaller matrix tells it."""
  given = rule.origin and rule.origin.hyperparameters.get('projections')
  return isinstance(said, Vectors) and given is None


def check_run(
  written: Folder, config: Mapping, arrays: Arrays, theta: Mapping, tuned: Tuned, trained: Mapping
) -> None:
  """Raises a ValueError unless the model computes with the folder what it does with the method.

  It is run where rules were not compared matrix by matrix: those that wrap calls, and those without
  theta. `theta` is what rules read, `trained` what `tuned.apply` takes.
  """
  others = {
    (rule.name, site.path or 'the model')
    for rule, site in tuned.rules
    if not isinstance(rule, Weight) or site.path not in theta.get(rule.name, {})
  }
  if not others:
    return
  acting = ', '.join(f'{name!r} at {path!r}' for name, path in sorted(others)[:3])
  method, own = as_rules(written, config, arrays, None)
  check_outputs(acting, arrays.pretrained, tuned, trained, method, own)


def _check_trained(rule: Weight, site: Site, array: str, t: np.ndarray) -> None:
  """Raises a ValueError unless a rule puts theta in the place of an array."""
  others = {name: jnp.full(leaf.shape, 0.37, leaf.dtype) for name, leaf in site.leaves.items()}
  new = rule.apply({array: jnp.asarray(t)}, site, others)
  if array not in new or not np.array_equal(new[array], t):
    raise ValueError(
      f'{rule.name!r} at {site.path!r} does more than train {array!r}: an adapter folder holds '
      'arrays that were trained whole'
    )
