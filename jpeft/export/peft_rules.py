"""What an adapter folder holds, as rules and their theta."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Method, Weight

from .peft_config import PREFIX_TUNING, PROMPT_TUNING, scaled
from .peft_found import Folder, matrix_in
from .peft_kin import Adapted, Making
from .peft_matrices import Factors, check_same, lone_site
from .peft_methods import INPUTS, OUTPUTS, SHARED, method_of, title_of
from .peft_names import Arrays, joined
from .peft_prompts import read_rows
from .peft_theta import each_layer, entries


def as_rules(
  found: Folder, config: Mapping, arrays: Arrays, name: str | None
) -> tuple[Method, dict]:
  """(method, theta) of what a folder holds."""
  rules: dict[Any, dict] = {}  # {(rank, alpha), 'modules' or 'bias': {site path: arrays}}
  for where, layers in found.factors.items():
    pair, values = _assembled(found, arrays, where, layers, bool(config.get('use_rslora')))
    site, _, array = where.rpartition('/')
    rules.setdefault(pair, {}).setdefault(site, {})[array] = values
  pairs = list(rules)
  for where, scales in found.scales.items():
    ordered = complete(found, arrays, where, scales)
    side = OUTPUTS if ordered[0].outputs else INPUTS
    site, _, array = where.rpartition('/')
    numbers = jnp.asarray(joined([one.l for one in ordered], arrays.places[where][0]))
    rules.setdefault(side, {}).setdefault(site, {})[array] = numbers
  for where, vectors in found.vectors.items():
    ordered = complete(found, arrays, where, vectors)
    site, _, array = where.rpartition('/')
    place, _ = arrays.places[where]
    entries = {part: jnp.asarray(joined([v.parts[part] for v in ordered], place)) for part in 'de'}
    rules.setdefault(SHARED, {}).setdefault(site, {})[array] = entries
  for where, adapted in found.kin.items():
    making, values = _of_kin(found, arrays, where, adapted)
    site, _, array = where.rpartition('/')
    rules.setdefault(making, {}).setdefault(site, {})[array] = values
  for where, whole in _whole(found, arrays).items():
    site, _, array = where.rpartition('/')
    kind = 'modules'
    if not all(f'{site}/{other}' in found.whole for other in arrays.owned(where)):
      kind = array
    rules.setdefault(kind, {}).setdefault(site, {})[array] = whole
  if found.rows is not None:
    kind = PREFIX_TUNING if config['peft_type'] == PREFIX_TUNING else PROMPT_TUNING
    read = read_rows(found.where, kind, found.rows, config, arrays)
    rules[kind] = jax.tree.map(jnp.asarray, read)
  makings = [kind for kind in rules if isinstance(kind, Making)]
  titles = {kind: title_of(kind, name, pairs, makings) for kind in rules}
  method = method_of(rules, titles, config, found)
  theta: dict[str, dict] = {}
  for kind, sites in rules.items():
    theta.setdefault(titles[kind], {}).update(sites)
    if isinstance(kind, Making) and kind.kin.shared is not None:
      common = kind.kin.shared.theta(found.shared)
      if common:
        theta[titles[kind]][''] = jax.tree.map(jnp.asarray, common)
  check_read(found, arrays, method, theta)
  return method, theta


def _assembled(
  found: Folder, arrays: Arrays, where: str, layers: Mapping[int, Factors], rslora: bool
) -> tuple[tuple[int, float], dict[str, jax.Array]]:
  """((rank, alpha) of a rule, its theta) of the factors of all layers of an array."""
  ordered = complete(found, arrays, where, layers)
  rank = max(factors.rank for factors in ordered)
  alpha = next(factors.alpha for factors in ordered if factors.rank == rank)
  if not alpha > 0:
    alpha = rank**0.5 if rslora else rank  # a scale of 1: what peft scales by goes into b
  scale = scaled(rank, alpha, rslora)
  padded = [_padded(factors, rank, scale) for factors in ordered]
  place, _ = arrays.places[where]
  return (rank, alpha), {
    part: jnp.asarray(joined([parts[part] for parts in padded], place), jnp.float32)
    for part in padded[0]
  }


def _of_kin(
  found: Folder, arrays: Arrays, where: str, layers: Mapping[int, Adapted]
) -> tuple[Making, dict[str, jax.Array]]:
  """(the kind and hyperparameters of a rule, its theta) of all layers of an array.

  Raises:
    ValueError: layers of a stack differ in their hyperparameters.
  """
  ordered = complete(found, arrays, where, layers)
  making = ordered[0].making
  for other in ordered:
    if other.making != making:
      raise ValueError(
        f'{found.where} has {dict(other.making.told)} at {other.module!r} and {dict(making.told)} '
        f'at {ordered[0].module!r}, which share a rule: load the backbone with scan=False'
      )
  each = [adapted.theta(found.where) for adapted in ordered]
  place, _ = arrays.places[where]
  return making, {part: jnp.asarray(joined([t[part] for t in each], place)) for part in each[0]}


def _padded(factors: Factors, rank: int, scale: float) -> dict[str, np.ndarray]:
  """The parts of a matrix, with a rank and a scale that may differ from its own."""
  more = rank - factors.rank
  found = {}
  for part, x in factors.parts.items():
    if part in ('a', 'a0'):
      x = np.pad(x, ((0, 0), (0, more)))
    elif part in ('b', 'b0'):
      x = np.pad(x, ((0, more), (0, 0)))
      if factors.scale != scale:
        x = x * (factors.scale / scale)
    found[part] = x
  return found


def complete(found: Folder, arrays: Arrays, where: str, layers: Mapping[int, Any]) -> list:
  """What there is of each layer of an array, in their order."""
  _, keys = arrays.places[where]
  for i, key in enumerate(keys):
    if i not in layers:
      raise ValueError(
        f'{found.where} adapts some layers of {where!r} and not {key!r}: load the backbone with '
        'scan=False'
      )
  return [layers[i] for i in range(len(keys))]


def _whole(found: Folder, arrays: Arrays) -> dict[str, jax.Array]:
  """{path: array} of what was trained whole."""
  stacked = {}
  for where, layers in found.whole.items():
    ordered = complete(found, arrays, where, layers)
    stacked[where] = jnp.asarray(joined(ordered, arrays.places[where][0]), jnp.float32)
  return stacked


def check_read(found: Folder, arrays: Arrays, method: Method, theta: Mapping) -> None:
  """Raises a ValueError unless the rules that were made compute what the folder says."""
  for name, path, array, values in entries(theta):
    where = f'{path}/{array}'
    stored = matrix_in(found, where)
    if stored is None:
      continue
    site = lone_site(path, array, (1, 1))
    rule = _acting(method, name, path)
    for layer, t in enumerate(each_layer(values, arrays, where)):
      if isinstance(stored[layer], Adapted):
        t = stored[layer].read(t)
      check_same(found.where, stored[layer], rule, site, array, t)


def _acting(method: Method, name: str, path: str) -> Weight:
  """The rule of a name that a method puts at a site."""
  for targets, rule in method:
    if isinstance(rule, Weight) and rule.name == name and re.fullmatch(targets, path):
      return rule
  raise ValueError(f'no rule {name!r} acts at {path!r}')
