"""LoRA and DoRA in an adapter folder: factors, and the scale of their product."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jpeft.core import Site, Tuned, Weight
from jpeft.thetas import on_matrix

from .peft_config import scaled
from .peft_content import Content
from .peft_matrices import PARTS, TABLE_PARTS
from .peft_names import Arrays, Fold, layers_of, module_of
from .peft_theta import entries, rule_of
from .peft_tied import HEAD, tied_head
from .peft_vera import is_vera


def check_scales(theta: Mapping, alpha: float | None, tuned: Tuned | None) -> None:
  """Raises a ValueError if nothing says how the factors of each rule are scaled."""
  if tuned is not None:
    return
  adapters = {
    name
    for name, _, _, values in entries(theta)
    if isinstance(values, Mapping) and not is_vera(values)
  }
  if not adapters:
    return
  if alpha is None:
    raise ValueError('save_adapter: give tuned=, whose rules are asked for their alphas, or alpha=')
  if len(adapters) > 1:
    raise ValueError(
      f'theta holds several adapters ({", ".join(sorted(adapters))}), and one alpha may not be '
      'that of all: give tuned=, whose rules are asked for theirs'
    )


def scale_of(name, path, array, values, alpha, rslora, tuned) -> float:
  """s of w + s a b: of the rule in `tuned`, else by alpha."""
  rank = np.shape(values['a'])[-1]
  if tuned is None:
    return scaled(rank, alpha, rslora)
  rule, site = rule_of(tuned, name, path)
  scale = _asked(rule, site, array, values)
  if alpha is not None and not np.isclose(scale, scaled(rank, alpha, rslora), rtol=1e-4):
    raise ValueError(
      f'alpha={alpha} with rslora={rslora} scales a b by {scaled(rank, alpha, rslora):.6g}, and '
      f'{name!r} at {path!r} by {scale:.6g}: leave alpha out, it is asked of the rules'
    )
  return scale


def _asked(rule: Weight, site: Site, array: str, values: Mapping) -> float:
  """s of w + s a b, asked of the rule itself on a small matrix.

  Of DoRA, whose columns have other lengths than those of w + s a b, the directions tell.
  """
  rng = np.random.default_rng(0)
  rank = np.shape(values['a'])[-1]
  w, a, b = (rng.standard_normal(shape) for shape in ((16, 16), (16, rank), (rank, 16)))
  parts = {'a': a, 'b': b}
  if 'm' in values:
    parts['m'] = np.ones(16)
  if 'a0' in values:
    parts |= {'a0': np.zeros_like(a), 'b0': np.zeros_like(b)}
  t = {part: jnp.asarray(x, jnp.float32) for part, x in parts.items()}
  new = np.asarray(on_matrix(rule, site, array, t, jnp.asarray(w, jnp.float32)), np.float64)
  product = a @ b
  if 'm' in values:
    # new_i / new_j = (w + s a b)_i / (w + s a b)_j for the rows i and j of a column
    left = new[:1] * w[1:] - new[1:] * w[:1]
    right = new[1:] * product[:1] - new[:1] * product[1:]
  else:
    left, right = new - w, product
  return float((left * right).sum() / (right**2).sum())


def add_factors(
  content: Content, arrays: Arrays, where: str, values: Mapping, keys, scale: float, rslora: bool
) -> None:
  """Adds the factors of one array."""
  place, _ = arrays.places[where]
  values = {part: np.asarray(x) for part, x in values.items()}
  if 'a0' in values:
    # a b - a0 b0 is LoRA of twice the rank.
    values = {
      'a': np.concatenate([values['a'], values['a0']], -1),
      'b': np.concatenate([values['b'], -values['b0']], -2),
    }
  rank = values['a'].shape[-1]
  alpha = _plain(scale * rank ** (0.5 if rslora else 1))
  modules = [module_of(key) for key in keys]
  for module in modules:
    if module in content.adapted:
      raise ValueError(
        f'theta has two adapters at {where!r}: an adapter folder holds one; jpeft.thetas.concat '
        'makes one of two, and two folders hold each'
      )
    content.adapted[module] = rank, alpha
  table = TABLE_PARTS if where.endswith('/embedding') else PARTS
  for part, x in values.items():
    for module, layer in zip(modules, layers_of(x, place), strict=True):
      content.tensors[f'{module}.{table[part]}'] = Fold(place).theirs(part, layer)
  if where == arrays.tied:
    if 'm' in values:
      raise ValueError(
        f'DoRA of {where!r}, which is the head of the model as well: peft gives the two magnitudes '
        'of their own; load the backbone through jpeft.models.untied'
      )
    content.tied = True
    content.tensors |= {f'{HEAD}.{end}': x for end, x in tied_head(values, None).items()}


def _plain(number: float) -> float:
  """A number that a float32 computation gave, as it was most likely written."""
  short = float(f'{number:.5g}')
  if abs(short - number) <= 2e-6 * abs(number):
    return short
  return number
