"""LoRAM: LoRA is trained on a narrow model, and used on the whole one.

Zhang et al., 2025, "Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language
Models" (arXiv 2502.13533); official code junzhang-zj/LoRAM. Before training, heads and hidden units
are cut off the model. For a kernel w [fan_in, fan_out], of which rows F and columns H stay:

  training   w[F, H] + s a b         a [|F|, r], b [r, |H|], s = alpha / r
  after it   w + s a' b'             a' is a in the rows F, b' is b in the columns H, and else 0

so that the update is 0 in all that was cut ("recovery"). Of n parts of a layer floor(ratio n) go:
the least important ones, or any. For gradients dw, summed over the batches of the pass, and over
the layers that share a part,

  importance of a part = sum over its numbers |w dw|

of q, k, v and o for a head, of the MLP's layers for a hidden unit (first order, as in LLM-Pruner,
arXiv 2305.11627). The first `skip_first` layers and the last `skip_last` lose nothing.

`jpeft.pruned` gives the narrow model, and `jpeft.recovered` brings the trained theta back. `jpeft
train` does both, and its theta is for the whole model. With `model.quantize=nf4_double` the narrow
model is stored in 4 bits while it is trained on (QLoRAM); what is used afterwards is the whole
model as it is in its files. The published pipeline first trains the narrow model a little on
general text ("alignment"), without which quality may fall below that of the whole model untuned.
That is training as any other: `full` on the narrow model, whose new weights are then trained on.

Deviations. With grouped queries a part is a key head with its group. A head of zeros, which no
gradient passes, is drawn anew for the importances. LoRA of the output layer (`lm_head`, in the
official scripts) is off unless `targets` names it. Masks of single weights (the paper's LoRAM-Unst
and LoRAM-Semi) are left out: a kernel with zeros is stored in as many bytes as any other, so that
nothing would be smaller here. So is the option to fill up a by random numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Found, Method, Pass, Preparation, Site, at, factory, prepared_by

from ..check import choice, require, whole
from .cuttable import (
  HEADS,
  KEPT,
  LINEAR,
  UNITS,
  LowRank,
  cut_paths,
  groups_of,
  is_between,
  is_one_of,
  kernel_of,
  parts_of,
  start,
)
from .lora import check_rank, lora
from .sensitivity import Tensor, groups, of_tensor, summed, with_head

# What parts are chosen by.
CHOICES = ('importance', 'random')
# Of what is found for a narrow model: nothing is left to cut.
_CUT = 'cut'


@factory
def loram(
  rank: int = 8,
  alpha: float = 16,
  targets: str = LINEAR,
  ratio: float = 0.85,
  by: str = 'importance',
  skip_first: int = 4,
  skip_last: int = 2,
  batches: int = 4,
  dropout: float = 0.0,
  name: str = 'loram',
) -> Method:
  """LoRA that is trained on a narrow model. It waits for a pass over examples (`prepare`).

  Args:
    rank: r.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of layers with LoRA, one kernel each.
    ratio: share of the heads and of the hidden units of a layer that are cut; 0 for none.
    by: 'importance' cuts what the loss depends on least, 'random' any; then the pass reads one
      batch, of which nothing is used.
    skip_first: number of layers at the beginning that lose nothing.
    skip_last: number of layers at the end that lose nothing.
    batches: of 32 examples that importances are measured on, at most: each example counts once.
    dropout: rate on what enters a; 0.05 in the official scripts.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, layers without one kernel, or heads
      that nothing counts; in the pass, no layer between those that lose nothing.
  """
  check_rank(rank, dropout)
  require(alpha > 0, 'loram', 'alpha', alpha, 'must be greater than 0')
  require(0 <= ratio < 1, 'loram', 'ratio', ratio, 'must lie in [0, 1)')
  choice('loram', 'by', by, CHOICES)
  whole('loram', 'skip_first', skip_first, 0)
  whole('loram', 'skip_last', skip_last, 0)
  whole('loram', 'batches', batches, 1)
  made = _Loram(
    LowRank(name, alpha / rank, dropout), rank, alpha, targets, ratio, by, skip_first, skip_last
  )
  preparation = Preparation(
    'chooses what to train without',
    made.find,
    made.resolved,
    told,
    batches=batches if by == 'importance' else 1,
    moved=lambda found, modules: {_CUT: np.ones(1, bool)},
    whole=made.lora,
    sized=made.sized,
  )
  return prepared_by(made.lora(), preparation)


def told(found: Found) -> str:
  """How much of the model stays."""
  parts = [x for key, x in found.items() if key.startswith('parts ')]
  layers = sum(int((~x).any(-1).sum()) for x in parts)
  kept = sum(int(x.sum()) for x in parts)
  return (
    f'trains on {kept:,} of {sum(x.size for x in parts):,} heads and hidden units; '
    f'{layers} attentions and MLPs lose some'
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Loram:
  """The pass and the rules; the fields are arguments of `loram`."""

  low_rank: LowRank
  rank: int
  alpha: float
  targets: str
  ratio: float
  by: str
  skip_first: int
  skip_last: int

  @property
  def name(self) -> str:
    return self.low_rank.name

  def lora(self) -> Method:
    """On the narrow model, and on the whole one after training."""
    return lora(self.rank, self.alpha, self.targets, self.low_rank.dropout, name=self.name)

  # The pass.

  def find(self, examples: Pass) -> dict[str, np.ndarray]:
    """{'parts path array': [layers, parts], which stay}."""
    sites = self.cut_sites(examples.find)
    if self.by == 'random':
      scores = {}
      for number, (path, site) in enumerate(sites.items()):
        key = jax.random.fold_in(examples.key, number)
        shape = (math.prod(site.theta_lengths), parts_of(self.name, site))
        scores[path] = np.asarray(jax.random.uniform(key, shape))
    else:
      scores = importances(self.name, examples)
    return self.chosen(sites, scores)

  def sized(self, find: Callable[[str], list[Site]]) -> dict[str, np.ndarray]:
    """As many parts as `find` keeps, the last ones of each layer."""
    sites = self.cut_sites(find)
    scores = {}
    for path, site in sites.items():
      numbers = np.arange(parts_of(self.name, site), dtype=np.float32)
      scores[path] = np.tile(numbers, (math.prod(site.theta_lengths), 1))
    return self.chosen(sites, scores)

  def cut_sites(self, find: Callable[[str], list[Site]]) -> dict[str, Site]:
    """{path: site} of the layers whose inputs are cut.

    Raises:
      ValueError: all of them are among those that lose nothing.
    """
    sites = {site.path: site for site in find(f'{HEADS}|{UNITS}')}
    if self.ratio and not any(self.may_lose(site).any() for site in sites.values()):
      depth = max(site.depth for site in sites.values())
      raise ValueError(
        f'{self.name}: none of the {depth} layers lies between the first {self.skip_first} and the '
        f'last {self.skip_last}, which lose nothing: give smaller skip_first= and skip_last='
      )
    return sites

  def may_lose(self, site: Site) -> np.ndarray:
    return is_between(site, self.skip_first, self.skip_last).reshape(-1)

  def chosen(
    self, sites: Mapping[str, Site], scores: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """What stays, by scores {path: [layers, parts]}."""
    found = {}
    for path, site in sites.items():
      kept = ~least(scores[path], self.ratio) | ~self.may_lose(site)[:, None]
      found[f'parts {path} {kernel_of(self.name, site)}'] = kept
    return found

  # The rules.

  def resolved(self, found: Found) -> Method:
    """LoRA on a narrow model, or LoRA on the whole one with zeros for what would be cut."""
    if _CUT in found:
      return self.lora()
    parts = {}
    for key, x in found.items():
      kind, path, _ = key.split(' ')
      if kind == 'parts':
        parts[path] = x
    init = functools.partial(self.init, parts)
    return at(f'(?:{self.targets})|{HEADS}|{UNITS}', self.low_rank.rule(init))

  def init(self, parts: Mapping[str, np.ndarray], key, site: Site, arrays) -> dict:
    array = kernel_of(self.name, site)
    t = {}
    if is_one_of(site, self.targets):
      t = start(key, site.leaves[array], self.rank)
    if site.path in parts and not parts[site.path].all():
      t[KEPT] = site.one_layer(parts[site.path], arrays.number)
    return {array: t} if t else {}


def least(scores: np.ndarray, ratio: float) -> np.ndarray:
  """True for the floor(ratio n) least of n scores [..., n]; of equal ones the first."""
  n = scores.shape[-1]
  count = math.floor(ratio * n + 1e-9)
  places = np.argsort(np.argsort(scores, -1, kind='stable'), -1, kind='stable')
  return places < count


def importances(name: str, examples: Pass) -> dict[str, np.ndarray]:
  """{path of a layer whose inputs are cut: importance [layers, parts]}.

  Args:
    name: of the method, for errors.
    examples: batches, which are held on the host: kernels are taken in turn, see `sensitivity`.

  Raises:
    ValueError: the loss depends on none of the kernels.
  """
  sites = {site.path: site for site in examples.find(LINEAR)}
  tensors = []
  for site in sites.values():
    array = kernel_of(name, site)
    tensors += [Tensor(site, array, i, True) for i in range(math.prod(site.theta_lengths))]
  shared_by: dict[str, list[str]] = {}
  scores = {}
  for path, members in groups_of(sites).items():
    site = sites[path]
    scores[path] = np.zeros((math.prod(site.theta_lengths), parts_of(name, site)))
    for member in members:
      shared_by.setdefault(member, []).append(path)

  batches = list(examples)
  backbone = with_head(examples)
  for some in groups(tensors):
    arrays, slopes = summed(examples, backbone, batches, some, added)
    for tensor in some:
      path = tensor.site.path
      size = np.abs(of_tensor(arrays, tensor) * of_tensor(slopes, tensor))
      sums = size.sum(1 if path in cut_paths(tensor.site) else 0)
      for cut in shared_by.get(path, ()):
        score = scores[cut][tensor.layer]
        score += sums.reshape(len(score), -1).sum(-1)
  if not any(x.any() for x in scores.values()):
    raise ValueError(f'{name}: the loss of the pass before training depends on no kernel')
  return scores


def added(total, gradient):
  """The sums of gradients with those of one more batch."""
  return jax.tree.map(jnp.add, total, gradient)
