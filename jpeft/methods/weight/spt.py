"""SPT: a budget of trained numbers is spent where a task is sensitive.

He et al., 2023, "Sensitivity-Aware Visual Parameter-Efficient fine-Tuning" (arXiv 2303.08566);
official code ziplab/SPT. Before training every number of the blocks gets its sensitivity, see
`sensitivity`. Of the tau most sensitive ones, c are in a kernel w [m, n] or in a vector [m]:

  a kernel with c >= cost / 10    is tuned whole: y = x w + x A B           cost = r (m + n)
                                  or by an adapter: y + U gelu(D y)         cost = 2 n r + r + n
  a kernel with fewer             in these c entries alone, see `sparse`
  a vector with c >= m / 5        is tuned whole
  a vector with fewer             stays

tau is that of `step`, 2 step, ... whose numbers, with those of the class token and of the head, are
the closest to the budget. The class token is always trained; so is the head, by `make` or by a
`tune('{head}')` in the chain. Patches, positions and head are not scored. Queries, keys and values
of a fused kernel are kernels of their own. Low-rank products and entries merge, adapters do not.

The function starts as the backbone. For the pass the head is drawn anew, so that the plan depends
on the key. Deviations: the pass reads the model in evaluation, without dropout or drop path, and
takes its batches in a fixed random order. Tuned vectors are differences from the backbone's. A
backbone in 4 bits keeps, of a kernel with single entries, the decoded kernel for the backward pass.
"""

import dataclasses
import math
import re

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
  Weight,
  at,
  chain,
  factory,
  prepared_by,
)

from ..adapter.bottleneck import Adapter
from ..check import choice, whole, within
from ..nn import drop, drop_path, uniform
from ..ragged import Live, ragged, slots
from ..subset.tune import tune
from . import sparse
from .budget import STRUCTURES, Allocation, Chosen, allocated, closest
from .lora import required
from .sensitivity import Tensor, sensitive

# The class token, by the names that models give it.
_TOKEN = re.compile('cls|cls_token|class_token|class_embedding')


@factory
def spt(
  budget: int = 400_000,
  structured: str = 'lora',
  rank: int = 8,
  step: int = 20_000,
  steps: int = 79,
  batches: int = 16,
  targets: str = '{q}|{k}|{v}|{o}|{fc1}|{fc2}',
  norms: str = '{norm}|{final_norm}',
  dropout: float = 0.0,
  path_dropout: float = 0.0,
  name: str = 'spt',
) -> Method:
  """Sensitivity-aware tuning. It waits for a pass over training examples, see `prepare`.

  Args:
    budget: trained numbers, with those of class token and head.
    structured: what a kernel gets that is tuned whole, 'lora' or 'adapter'.
    rank: r of both.
    step: between the numbers of sensitive entries that are tried.
    steps: how many of these are tried.
    batches: of 32 examples that are scored, at most: each example is scored once.
    targets: pattern of the layers whose kernels and biases may be tuned.
    norms: pattern of further sites whose vectors may be.
    dropout: rate on the input of a low-rank product; 0.1 in the paper.
    path_dropout: rate at which an example, the first axis, gets none of it in training; 0.1 in the
      paper.
    name: in theta; with '_adapter', '_vectors' and '_token' behind it for parts of it.

  Raises:
    ValueError: a hyperparameter outside its range; at the pass, an adapter behind a part of a fused
      layer, or a loss that depends on no kernel.
  """
  for argument, value in (('budget', budget), ('rank', rank), ('step', step), ('steps', steps)):
    whole('spt', argument, value, 1)
  whole('spt', 'batches', batches, 1)
  choice('spt', 'structured', structured, STRUCTURES)
  within('spt', 'dropout', dropout, 0, 1)
  within('spt', 'path_dropout', path_dropout, 0, 1)
  made = _Spt(budget, structured, rank, step, steps, targets, norms, dropout, path_dropout, name)
  bound = (
    f'planned as all vectors of norms and single entries in all kernels alike, {budget:,}; what '
    'is trained depends on a pass over the training examples'
  )
  preparation = Preparation(
    'chooses what is trained', made.find, made.resolved, told, size=32, batches=batches, bound=bound
  )
  return prepared_by(made.before(), preparation)


def told(found: Found) -> str:
  """What was chosen."""
  total, tau, budget = found['plan']
  kinds = dict.fromkeys(('structured', 'entries', 'vector'), 0)
  for key, x in found.items():
    kind = key.split()[0]
    if kind in kinds:
      kinds[kind] += len(np.unique(x if x.ndim == 1 else x[:, 0]))
  return (
    f'trains {total:,} numbers, of a budget of {budget:,}: {kinds["structured"]} kernels whole, '
    f'entries of {kinds["entries"]} and {kinds["vector"]} vectors, by the {tau:,} most sensitive'
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Spt:
  """The pass and the rules of `spt`; the fields are its arguments."""

  budget: int
  structured: str
  rank: int
  step: int
  steps: int
  targets: str
  norms: str
  dropout: float
  path_dropout: float
  name: str

  # Before the pass: entries in all kernels alike.

  def before(self) -> Method:
    vectors = Weight(self.name, _all_vectors, _with_vectors)
    return chain(at(self.targets, self.kernels(self.init_before)), at(self.norms, vectors))

  def init_before(self, key, site: Site, arrays) -> dict:
    kernels = [(one, name) for one in site.model.find(self.targets) for name in _kernels(one)]
    vectors = [one for one in site.model.find(self.norms) if one.leaves]
    rest = self.budget - sum(one.layers * sum(_lengths(one).values()) for one in vectors)
    count = rest // sum(one.layers for one, _ in kernels)
    t = {}
    for array in _kernels(site):
      m, n = site.leaves[array].fan_in, site.leaves[array].fan_out
      own = max(1, min(count, m * n))
      places = np.arange(own) * (m * n) // own
      t[array] = {**sparse.entries_of(places // n, places % n), 'delta': jnp.zeros(own)}
    return t

  # The pass.

  def find(self, examples: Pass) -> dict[str, np.ndarray]:
    """{kind, path and array: what is trained there}; the kinds are those of `resolved`."""
    tensors = self.tensors(examples)
    most = sensitive(examples, tensors, self.step * self.steps)
    shapes = [tensor.shape for tensor in tensors]
    tokens = _tokens(examples)
    fixed = sum(math.prod(site.leaves[array].shape) for site, array in tokens) + _head(examples)
    plan = closest(most.tensor, shapes, self.budget - fixed, self.allocate, self.step, self.steps)
    found = {'plan': np.array([plan.total + fixed, plan.tau, self.budget])}
    for site, array in tokens:
      found[f'token {site.path} {array}'] = np.zeros(0, np.int32)
    first = most.first(plan.tau)
    for number, kind in enumerate(plan.kinds):
      tensor = tensors[number]
      if kind is None:
        continue
      key = f'{kind} {tensor.site.path} {tensor.array}'
      new = np.array([tensor.layer], np.int32)
      if kind == 'entries':
        places = np.sort(first.place[first.tensor == number])
        n = tensor.shape[1]
        layer = np.full(len(places), tensor.layer)
        new = np.stack([layer, places // n, places % n], 1).astype(np.int32)
      found[key] = np.concatenate([found[key], new]) if key in found else new
      if tensor.site.axes:
        found[f'layers {tensor.site.path}'] = np.array(math.prod(tensor.site.theta_lengths))
    return found

  def allocate(self, counts: np.ndarray, shapes) -> Allocation:
    return allocated(counts, shapes, self.structured, self.rank)

  def tensors(self, examples: Pass) -> list[Tensor]:
    """All that may be tuned, layer by layer."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for site in [*examples.find(self.targets), *examples.find(self.norms)]:
      for array, leaf in site.leaves.items():
        is_matrix = array in _kernels(site)
        if not is_matrix and (leaf.is_matrix or not jnp.issubdtype(leaf.dtype, jnp.floating)):
          continue
        if is_matrix and site.part and self.structured == 'adapter':
          raise ValueError(
            f"{self.name}: structured='adapter' acts behind whole layers, and {site.path!r} is a "
            f"part of {site.owner!r}: use structured='lora'"
          )
        layers = range(math.prod(site.theta_lengths))
        found[site.path, array] = [Tensor(site, array, i, is_matrix) for i in layers]
    ordered = sorted(found.values(), key=lambda own: own[0].site.owner)
    return [tensor for own in ordered for tensor in own]

  # After the pass.

  def resolved(self, found: Found) -> Method:
    """The method of what was found: 'entries', 'structured', 'vector' and 'token'."""
    chosen = Chosen.of(found)
    parts = []
    if chosen.kernels(self.structured == 'lora'):
      rule = self.kernels(_Kernels(chosen, self).init)
      parts.append(ragged(at(self.targets, rule), _Kernels(chosen, self).live()))
    if self.structured == 'adapter' and chosen.structured:
      parts.append(_Adapters(chosen, self).method())
    if chosen.vector:
      parts.append(_Vectors(chosen, self).method())
    for path, array in chosen.token:
      parts.append(tune(re.escape(path), re.escape(array), name=f'{self.name}_token'))
    return chain(*parts)

  # Kernels: low-rank products and single entries.

  def kernels(self, init) -> Weight:
    needs = required(max(self.dropout, self.path_dropout))
    return Weight(self.name, init, self.weights, self.product, requires=needs)

  def weights(self, t, site: Site, arrays) -> dict:
    made = {}
    for array, own in t.items():
      leaf = site.leaves[array]
      w = leaf.fold(arrays[array])
      if 'delta' in own:
        w = sparse.added(own, w)
      if 'a' in own:
        w = w + (own['a'] @ own['b']).astype(w.dtype)
      made[array] = leaf.unfold(w)
    return made

  def product(self, t, x, y, w, key) -> jax.Array:
    (own,) = t.values()
    if 'delta' in own:
      y = sparse.product(own, x, w())
    if 'a' not in own:
      return y
    keys = (None, None) if key is None else jax.random.split(key)
    added = (x.map(lambda v: drop(v, keys[0], self.dropout)) @ own['a']) @ own['b']
    return y + drop_path(added, keys[1], self.path_dropout)


@dataclasses.dataclass(frozen=True, eq=False)
class _Kernels:
  """theta of the kernels, in stacks filled up; see `ragged`."""

  chosen: Chosen
  spt: _Spt

  def __post_init__(self):
    # Of a state that depends on the plan alone, made once.
    object.__setattr__(
      self, 'filled', {place: self._filled(place) for place in self.chosen.entries}
    )

  def init(self, key, site: Site, arrays) -> dict:
    t = {}
    for array in site.matrices:
      place = site.path, array
      own = {}
      if place in self.chosen.entries:
        state = self.filled[place]
        own = {name: site.one_layer(x, arrays.number) for name, x in state.items()}
        own['delta'] = jnp.zeros(own['at'].shape)
      if self.spt.structured == 'lora' and place in self.chosen.structured:
        leaf = site.leaves[array]
        own['a'] = uniform(key, (leaf.fan_in, self.spt.rank), leaf.fan_in**-0.5)
        own['b'] = jnp.zeros((self.spt.rank, leaf.fan_out))
      if own:
        t[array] = own
    return t

  def live(self) -> dict[str, Live]:
    per_place: dict[tuple[str, str], dict] = {}
    for place, x in self.chosen.entries.items():
      per_place.setdefault(place, {})['delta'] = slots(x[:, 0])
    if self.spt.structured == 'lora':
      for place, layers in self.chosen.structured.items():
        per_place.setdefault(place, {}).update(a=(layers,), b=(layers,))
    return self.chosen.stacks(per_place)

  def _filled(self, place: tuple[str, str]) -> dict[str, np.ndarray]:
    """The state of the entries of all layers, [layers, ...]; what fills up is 0."""
    x = self.chosen.entries[place]
    states = []
    for layer in range(self.chosen.layers.get(place[0], 1)):
      own = x[x[:, 0] == layer]
      states.append(sparse.entries_of(own[:, 1], own[:, 2]))
    return sparse.filled(states)


@dataclasses.dataclass(frozen=True, eq=False)
class _Adapters:
  """Adapters behind the layers that are tuned whole."""

  chosen: Chosen
  spt: _Spt

  def method(self) -> Method:
    paths = dict.fromkeys(re.escape(path) for path, _ in self.chosen.structured)
    rule = Call(f'{self.spt.name}_adapter', self.apply, self.init)
    live = {}
    for (path, _), layers in self.chosen.structured.items():
      if path in self.chosen.layers:
        names = [f'{side}/{x}' for side in ('down', 'up') for x in ('kernel', 'bias')]
        live[path] = {name: (layers,) for name in names}
    return ragged(at('|'.join(paths), rule), live)

  @property
  def adapter(self) -> Adapter:
    return Adapter('spt', 'gelu', 'lora', 0.0, bottleneck=self.spt.rank)

  def init(self, key, site: Site, arrays) -> dict:
    width = jax.ShapeDtypeStruct((site.leaves[site.matrices[0]].fan_out,), jnp.float32)
    return self.adapter.init(key, width, width)

  def apply(self, t, call, *args, **kwargs):
    leaf = call.site.leaves[call.site.matrices[0]]

    def adapted(h):
      rows = h.reshape(*h.shape[: h.ndim - len(leaf.outs)], leaf.fan_out)
      return (rows + self.adapter.apply(t, rows)).reshape(h.shape)

    return call.site.map_stream(call(*args, **kwargs), adapted)


@dataclasses.dataclass(frozen=True, eq=False)
class _Vectors:
  """Differences of the vectors that are tuned whole."""

  chosen: Chosen
  spt: _Spt

  def method(self) -> Method:
    rule = Weight(f'{self.spt.name}_vectors', self.init, self.apply)
    pattern = f'{self.spt.targets}|{self.spt.norms}'
    live: dict[str, dict] = {}
    for (path, array), layers in self.chosen.vector.items():
      if path in self.chosen.layers:
        live.setdefault(path, {})[array] = (layers,)
    return ragged(at(pattern, rule), live)

  def init(self, key, site: Site, arrays) -> dict:
    names = [array for path, array in self.chosen.vector if path == site.path]
    return {array: jnp.zeros(math.prod(site.leaves[array].shape)) for array in names}

  def apply(self, t, site: Site, arrays) -> dict:
    return _with_vectors(t, site, arrays)


def _with_vectors(t, site: Site, arrays) -> dict:
  return {
    array: arrays[array] + x.reshape(arrays[array].shape).astype(arrays[array].dtype)
    for array, x in t.items()
  }


def _all_vectors(key, site: Site, arrays) -> dict:
  return {array: jnp.zeros(length) for array, length in _lengths(site).items()}


def _lengths(site: Site) -> dict[str, int]:
  """{array: numbers} of the vectors of a norm."""
  rest = {array: leaf for array, leaf in site.leaves.items() if not leaf.is_matrix}
  floats = {a: x for a, x in rest.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  return {array: math.prod(leaf.shape) for array, leaf in floats.items()}


# Of a model.


def _kernels(site: Site) -> list[str]:
  """The kernels of a site that are one matrix; experts are left alone."""
  return [array for array in site.matrices if not site.leaves[array].batch]


def _tokens(examples: Pass) -> list[tuple[Site, str]]:
  return [
    (site, array)
    for site in examples.sites.values()
    for array in site.leaves
    if _TOKEN.fullmatch(array)
  ]


def _head(examples: Pass) -> int:
  """Numbers of the head; 0 where the model's family has none."""
  return sum(
    math.prod(leaf.shape) * site.layers
    for site in examples.sites.of_role('head')
    for leaf in site.leaves.values()
  )
