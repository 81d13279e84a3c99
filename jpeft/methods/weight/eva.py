"""EVA: LoRA that starts at the directions in which its inputs vary most, with ranks of their own.

Paischer et al., 2024 (arXiv 2410.07170). A pass over some batches of training examples gathers what
enters each layer, rows x [fan_in]. Their principal components v_1, v_2, .. with explained variances
e_1 >= e_2 >= .. give a [fan_in, r_l]; b [r_l, fan_out] starts at 0:

  share_i = e_i / sum of all e        w' = w + s a b       s = alpha / r

The budget, r for each layer on average, goes to the components of the largest shares over all
layers, at most rho r to one layer. Layers that get none are not adapted. s is the same in all
layers, as with peft's `adjust_scaling_factors`.

In a folder of Hugging Face peft it is LoRA with a rank_pattern.

Deviations. The paper updates a truncated SVD batch by batch until its vectors stop to turn. Here
C y is summed over all batches, C the covariance of the inputs and y [fan_in, 2 rho r + 10] random,
and the components follow from it at the end (Nystroem's approximation, Tropp et al., 2017,
1706.05736): the same for any order and size of batches, exact where y is as wide as the inputs.
Rows at which the model's `mask` is 0 are left out, or its `decoder_mask` in a decoder behind an
encoder, but for the keys and values that it makes of what the encoder gives; a last batch that is
filled up is left out too.
In a scanned stack factors are as large as the largest rank in it: the others are filled up by
zeros, which no gradient moves. Convolutions, kernels with a batch axis, and modules that own bare
arrays are refused, since what enters their product cannot be told from what enters the module.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import (
  Call,
  Found,
  Method,
  Pass,
  Preparation,
  Site,
  Sites,
  at,
  factory,
  matrix,
  prepared_by,
)

from ..arguments import first_array
from ..check import at_least, require
from ..masks import reads_other_sequence
from ..nn import drop, uniform
from .lora import check_rank

_MORE = 10  # random columns beyond twice the rank


@factory
def eva(
  rank: int = 16,
  alpha: float = 16,
  targets: str = '{q}|{v}',
  rho: float = 2.0,
  dropout: float = 0.0,
  batches: int = 16,
  name: str = 'eva',
) -> Method:
  """LoRA by explained variance. It waits for a pass over training examples, see `prepare`.

  Args:
    rank: r, the mean over layers.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of sites, of one kernel each.
    rho: a layer gets at most rho times the rank; 1 gives all layers the same.
    dropout: rate on what enters a.
    batches: how many batches the pass reads at most.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at the pass or at `attach`, a layer whose input
      cannot be read.
  """
  check_rank(rank, dropout)
  require(alpha > 0, 'eva', 'alpha', alpha, 'must be greater than 0')
  at_least('eva', 'rho', rho, 1)
  at_least('eva', 'batches', batches, 1)
  made = _Eva(rank, alpha / rank, targets, rho, dropout, name)
  preparation = Preparation(
    'chooses ranks',
    made.find,
    made.resolved,
    told,
    batches=batches,
    bound='ranks move between layers, and their sum stays at most what is shown',
  )
  return prepared_by(made.method(targets), preparation)


def told(found: Found) -> str:
  """Which ranks the layers got."""
  ranks = np.concatenate([x for key, x in found.items() if key.startswith('ranks ')])
  examples = int(found['rows'])
  return (
    f'gave {ranks.sum()} components to {len(ranks)} layers, {ranks.min()} to {ranks.max()} each, '
    f'by {examples:,} rows'
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Eva:
  """The rules of `eva`; the fields are its arguments.

  Attributes:
    found: {'ranks path': [layers], 'path': components [layers, r, fan_in]}; None before the pass.
  """

  rank: int
  scale: float
  targets: str
  rho: float
  dropout: float
  name: str
  found: Found | None = None

  def method(self, targets: str) -> Method:
    def init(key, w):
      return {'a': jnp.zeros((w.shape[0], self.rank)), 'b': jnp.zeros((self.rank, w.shape[1]))}

    def weight(t, w):
      return w + (self.scale * (t['a'] @ t['b'])).astype(w.dtype)

    def dot(t, x, y, w, key):
      low = x.map(lambda v: drop(v, key, self.dropout)) @ t['a']
      return y + self.scale * (low @ t['b'])

    rule = matrix(self.name, init, weight, dot, requires='input')
    return at(targets, dataclasses.replace(rule, init=self.init))

  def resolved(self, found: Found) -> Method:
    """The method of the layers that got a component."""
    paths = [
      key.removeprefix('ranks ') for key, x in found.items() if key.startswith('ranks ') and x.any()
    ]
    made = dataclasses.replace(self, found=found)
    return made.method('|'.join(map(re.escape, paths))) if paths else Method()

  def init(self, key, site: Site, arrays) -> dict:
    array = self.kernel(site)
    leaf = site.leaves[array]
    if self.found is None:
      a = uniform(key, (leaf.fan_in, self.rank), leaf.fan_in**-0.5)
    else:
      a = self.components(site, arrays.number, leaf.fan_in).T
    return {array: {'a': a, 'b': jnp.zeros((a.shape[1], leaf.fan_out))}}

  def components(self, site: Site, number, fan_in: int) -> jax.Array:
    """[r, fan_in] of one layer."""
    found = self.found or {}
    x = found.get(site.path)
    layers = math.prod(site.theta_lengths)
    if x is None or (len(x), x.shape[-1]) != (layers, fan_in):
      raise ValueError(
        f'{self.name} at {site.path!r}: components were found for other layers: make the pass '
        'again (jpeft.prepare)'
      )
    return site.one_layer(x, number)

  def kernel(self, site: Site) -> str:
    """The kernel of a layer whose input can be read.

    Raises:
      ValueError: there is none, or there are several.
    """
    if len(site.matrices) == 1:
      (array,) = site.matrices
      leaf = site.leaves[array]
      if leaf.use == 'dot_general' and not leaf.batch:
        return array
    raise ValueError(
      f'{self.name} at {site.path!r}: it reads what enters a layer of one kernel, and this one has '
      f'{", ".join(site.matrices) or "none"}: name linear layers alone in targets'
    )

  # The pass.

  def find(self, examples: Pass) -> dict[str, np.ndarray]:
    """The components of all layers, and how many each of them gets."""
    sites = examples.find(self.targets)
    most = math.ceil(self.rank * self.rho)
    tests = {}
    for number, site in enumerate(sites):
      fan_in = site.leaves[self.kernel(site)].fan_in
      own_key = jax.random.fold_in(examples.key, number)
      tests.setdefault(site.owner, _test_matrix(own_key, fan_in, 2 * most + _MORE))
    sums: dict[str, dict[str, np.ndarray]] = {}
    for batch, taps in examples.tapped(self.taps(sites, tests)):
      mask = None if batch.mask is None else np.asarray(examples.fetch(batch.mask))
      if mask is not None and not mask.all():
        continue
      for path, tap in taps.items():
        own = sums.setdefault(path, {})
        for entry, x in tap.items():
          own[entry] = own.get(entry, 0) + np.asarray(x, np.float64)
    if not sums:
      raise ValueError(f'{self.name}: the pass needs a whole batch of training examples')
    spectra = {}
    for site in sites:
      layers = math.prod(site.theta_lengths)
      own = {
        entry: x.reshape(layers, *x.shape[len(site.theta_lengths) :])
        for entry, x in sums[site.owner].items()
      }
      test = np.asarray(tests[site.owner], np.float64)
      spectra[site.path] = [
        principal({entry: x[i] for entry, x in own.items()}, test, most) for i in range(layers)
      ]
    return chosen(spectra, self.rank) | {'rows': next(iter(sums.values()))['count'].max()}

  def taps(self, sites: list[Site], tests: Mapping[str, jax.Array]) -> Method:
    """A method that records sums over the rows that enter layers."""
    name = f'{self.name} inputs'
    shapes = {site.owner: _shape_of_input(site, self.kernel(site)) for site in sites}
    of_encoder = _of_encoder(sites[0].model)

    def at_layer(t, call, *args, **kwargs):
      path = call.site.path
      x = first_array(call, args, kwargs)
      shape = shapes[path]
      if x.shape[x.ndim - len(shape) :] != shape:
        raise ValueError(
          f'{self.name} at {path!r}: its input {list(x.shape)} does not end as its kernel begins, '
          f'{list(shape)}: leave it out of targets'
        )
      lead = x.shape[: x.ndim - len(shape)]
      of_decoder = path.startswith('decoder') and path not in of_encoder
      side = 'decoder_mask' if of_decoder else 'mask'
      mask = None if call.root is None else call.root.get(side)
      counts = jnp.ones(lead, jnp.float32)
      if mask is not None and mask.shape == lead:
        counts = (mask > 0).astype(jnp.float32)
      call.tap(**_sums(x.reshape(math.prod(lead), -1), counts.reshape(-1, 1), tests[path]))
      return call(*args, **kwargs)

    owners = '|'.join(map(re.escape, tests))
    return at(owners, Call(name, at_layer))


def _of_encoder(sites: Sites) -> set[str]:
  """The paths of the layers that make keys and values of another sequence than their block's."""
  crossing = [site.path for site in sites.of_role('attention') if reads_other_sequence(site.inputs)]
  made = [site.owner for role in ('k', 'v') for site in sites.of_role(role)]
  return {path for path in made if any(path.startswith(f'{outer}/') for outer in crossing)}


def _shape_of_input(site: Site, array: str) -> tuple[int, ...]:
  """The last axes of what a layer is called with."""
  leaf = site.leaves[array]
  return tuple(leaf.shape[i] for i in leaf.ins)


def _test_matrix(key: jax.Array, fan_in: int, columns: int) -> jax.Array:
  """Random [fan_in, columns]; the identity where that is no larger."""
  if columns >= fan_in:
    return jnp.eye(fan_in)
  return jax.random.normal(key, (fan_in, columns))


def _sums(x: jax.Array, counts: jax.Array, test: jax.Array) -> dict[str, jax.Array]:
  """Sums over the rows of x [n, fan_in] that count, from which C y follows."""
  x = x.astype(jnp.float32) * counts
  return {
    'count': counts.sum(),
    'sum': x.sum(0),
    'square': jnp.square(x).sum(),
    'product': x.T @ (x @ test),
  }


def principal(
  sums: Mapping[str, np.ndarray], test: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """(shares [k] of the variance, components [k, fan_in]) of the largest, k at most `most`.

  Args:
    sums: of one layer, from `_sums`.
    test: y.
    most: how many are wanted.
  """
  count = sums['count']
  mean = sums['sum'] / count
  total = sums['square'] / count - mean @ mean
  product = sums['product'] / count - np.outer(mean, mean @ test)  # C y
  # A shift makes y^T C y safely positive; it is taken off the eigenvalues again.
  shift = 1e-9 * max(np.linalg.norm(product), np.finfo(np.float64).tiny)
  shifted = product + shift * test
  inner = test.T @ shifted
  values, vectors = np.linalg.eigh((inner + inner.T) / 2)
  kept = values > 1e-9 * max(values.max(), np.finfo(np.float64).tiny)
  root = shifted @ vectors[:, kept] / np.sqrt(values[kept])
  left, singular, _ = np.linalg.svd(root, full_matrices=False)
  variances = np.maximum(singular**2 - shift, 0)
  wanted = (variances > 1e-7 * max(total, np.finfo(np.float64).tiny))[:most].sum()
  return variances[:wanted] / max(total, np.finfo(np.float64).tiny), left[:, :wanted].T


def chosen(spectra: Mapping[str, list], rank: int) -> dict[str, np.ndarray]:
  """{'ranks path': [layers], 'path': [layers, r, fan_in]} of the components of the largest shares.

  Args:
    spectra: {path: [(shares, components) of each layer]}.
    rank: components a layer on average.
  """
  entries = [
    (-share, number, path, layer)
    for path, layers in spectra.items()
    for layer, (shares, _) in enumerate(layers)
    for number, share in enumerate(shares)
  ]
  budget = rank * sum(map(len, spectra.values()))
  ranks = {path: np.zeros(len(layers), np.int32) for path, layers in spectra.items()}
  for _, _, path, layer in sorted(entries)[:budget]:
    ranks[path][layer] += 1
  found: dict[str, np.ndarray] = {}
  for path, layers in spectra.items():
    found[f'ranks {path}'] = ranks[path]
    if not ranks[path].any():
      continue
    fan_in = layers[0][1].shape[-1]
    padded = np.zeros((len(layers), ranks[path].max(), fan_in), np.float32)
    for layer, (_, components) in enumerate(layers):
      padded[layer, : ranks[path][layer]] = components[: ranks[path][layer]]
    found[path] = padded
  return found
