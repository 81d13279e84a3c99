"""LaMDA++: LaMDA with ranks by the singular values of the kernels.

Azizi et al., 2024 (arXiv 2406.12832). The energy of a kernel is the share of its squared singular
values s that the largest r have,

  E(r) = sum_{i <= r} s_i^2 / sum_i s_i^2

The third of all kernels with the most energy gets a smaller rank, the third with the least a larger
one, and the mean stays r. Each kernel is then one of `lamda`, by rank: 'lamda_pp_16', and so on. In
a scanned stack the rules of all ranks run in each layer, and one of them counts.

Deviations. The paper says that layers are ranked by energy within a budget. Which ranks there are,
and how many layers get each, is not known to us: here three ranks, in thirds. The energies are
those of single kernels and not of blocks. Of a layer with several kernels their mean decides.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Found, Method, Pass, Preparation, Weight, at, chain, factory, prepared_by

from ..check import require
from .lamda import lamda


@factory
def lamda_pp(
  rank: int = 32,
  spread: float = 0.5,
  alpha: float = 32,
  targets: str = '{linear}',
  freeze: float = 0.3,
  schedule: str = 'paper',
  dropout: float = 0.0,
  init: str = 'spectral',
  name: str = 'lamda_pp',
) -> Method:
  """LaMDA++: ranks by the singular values of the kernels.

  They are found by `prepare`, which reads the backbone and of the examples their shapes alone.

  Args:
    rank: the mean of all ranks.
    spread: how far the smaller and the larger ranks are from it, as a share of it.
    alpha, targets, freeze, schedule, dropout, init: as for `lamda`; of a kernel of rank r the
      product is scaled by alpha / r.
    name: in theta, with '_16' behind it for rank 16.

  Raises:
    ValueError: as `lamda`; a spread outside (0, 1), or one that moves no rank.
  """
  require(0 < spread < 1, 'lamda_pp', 'spread', spread, 'must lie between 0 and 1')

  def of_rank(r: int, targets: str) -> Method:
    return lamda(r, alpha, targets, freeze, schedule, dropout, init, f'{name}_{r}')

  before = of_rank(rank, targets)
  step = round(spread * rank)
  require(step >= 1, 'lamda_pp', 'spread', spread, f'moves no rank of {rank}')

  def find(examples: Pass) -> dict[str, np.ndarray]:
    """{'ranks path': [layers], 'numbers path': those of the layers of a stack}."""
    sites = {site.path: site for site in examples.find(targets) if site.matrices}
    energies = _energies(examples, targets, rank)
    flat = np.concatenate([energies[path] for path in sites])
    parts = np.cumsum([len(energies[path]) for path in sites])[:-1]
    found = {}
    for path, ranks in zip(sites, np.split(ranks_of(flat, rank, step), parts), strict=True):
      found[f'ranks {path}'] = ranks
      if sites[path].axes:
        numbers = np.asarray(sites[path].choose(jnp.asarray(sites[path].number)))
        found[f'numbers {path}'] = numbers.reshape(-1)
    return found

  def resolved(found: Found) -> Method:
    paths: dict[tuple, list[str]] = {}  # by rank, and by layers of a stack
    for path, ranks in _ranks_in(found).items():
      numbers = found.get(f'numbers {path}')
      for r in np.unique(ranks).tolist():
        layers = None
        if numbers is not None and len(np.unique(ranks)) > 1:
          layers = tuple(numbers[ranks == r].tolist())
        paths.setdefault((r, layers), []).append(re.escape(path))
    parts = []
    for (r, layers), own in paths.items():
      ((pattern, rule),) = of_rank(r, '|'.join(own))
      parts.append(at(pattern, rule, layers=layers))
    return chain(*parts)

  preparation = Preparation(
    'chooses ranks',
    find,
    resolved,
    _told_ranks,
    batches=1,
    bound=f'planned with rank {rank} everywhere, the mean of the ranks that singular values give',
    name=name,
  )
  return prepared_by(before, preparation)


def ranks_of(energy: Sequence[float] | np.ndarray, rank: int, step: int) -> np.ndarray:
  """The rank of each kernel: `rank`, and of the extreme thirds `step` less or more.

  Args:
    energy: the share of squared singular values that the largest `rank` have.
    rank, step: whole numbers.
  """
  order = np.argsort(-np.asarray(energy), kind='stable')
  third = len(order) // 3
  ranks = np.full(len(order), rank)
  ranks[order[:third]] -= step
  ranks[order[len(order) - third :]] += step
  return ranks


def energy(w: jax.Array, rank: int) -> jax.Array:
  """The share of the squared singular values of w [..., m, n] that the largest `rank` have."""
  w = w.astype(jnp.float32)
  if w.shape[-2] > w.shape[-1]:
    w = jnp.swapaxes(w, -1, -2)
  squares = jnp.linalg.eigvalsh(w @ jnp.swapaxes(w, -1, -2))  # rising
  return squares[..., -rank:].sum(-1) / jnp.maximum(squares.sum(-1), jnp.finfo(jnp.float32).tiny)


def _energies(examples: Pass, targets: str, rank: int) -> dict[str, np.ndarray]:
  """{path: [layers]}, of a site with several kernels their mean."""

  def init(key, site, arrays):
    if not site.matrices:
      return {}
    own = [energy(site.leaves[a].fold(arrays[a]), rank).mean() for a in site.matrices]
    return {'energy': jnp.stack(own).mean()}

  def unchanged(t, site, arrays):
    return {array: arrays[array] for array in site.matrices}

  rule = Weight('energy', init, unchanged)
  tuned = examples.attached(at(targets, rule, layers=examples.layers))
  found = examples.fetch(tuned.init(examples.key, examples.backbone)['energy'])
  return {path: np.asarray(t['energy']).reshape(-1) for path, t in found.items()}


def _ranks_in(found: Found) -> dict[str, np.ndarray]:
  return {key.removeprefix('ranks '): x for key, x in found.items() if key.startswith('ranks ')}


def _told_ranks(found: Found) -> str:
  ranks, counts = np.unique(np.concatenate([*_ranks_in(found).values()]), return_counts=True)
  parts = [f'rank {r} for {c}' for r, c in zip(ranks, counts, strict=True)]
  return f'chose {", ".join(parts)} kernels'
