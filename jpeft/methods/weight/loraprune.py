"""LoRAPrune: heads and hidden units are pruned while LoRA is trained, by its factors alone.

Zhang et al., 2023, "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning" (arXiv
2305.18403); official code aim-uofa/LoRAPrune. For a kernel w [fan_in, fan_out] (the paper's W is
its transpose), a [fan_in, r], b [r, fan_out], their gradients da and db, s = alpha / r:

  g = a db + da b - da db         the gradient of w, which is never formed by the backward pass
  I = | g * (w + s a b) |         entrywise; one layer at a time exists
  q, k, v, first of the MLP       I summed over inputs, and over the outputs of a part
  o, last of the MLP              I summed over outputs, and over the inputs of a part

A part is a head, or a hidden unit. The sums over the parts of a layer are divided by their norm and
added over the layers that share the parts: those of one attention, those of one MLP. An importance
is a moving average of them, beta I + (1 - beta) I_now in every update.

Of T updates the share p of pruned parts is 0 for the first `warmup`, `sparsity` for the last
`settle`, and between them sparsity (1 - (1 - progress)^3). Every `every` updates, and once where
`settle` begins, the floor(p n) least of n parts go, never to return:

  y' = (k x) w + s (k x) a b      k [fan_in] 1 or 0, for o and the last layer of the MLP

which is the function of 0 in the outputs of the layers before them. The first `skip_first` of all
layers and the last `skip_last` lose nothing. `jpeft.keep_of` reads off a theta what stays, and
`jpeft.narrowed` cuts the merged weights down to it, as `jpeft merge` does.

Deviations. With grouped queries, which the official code does not have, a part is a key head with
its group. Gradients are those of the whole batch before they are clipped: normalised sums differ in
da db alone. One choice is made at the exact `sparsity`, where the official code stops below it. The
paper squares I; the official code, and this one, takes its size.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core import Method, Site, State, at, factory

from ..check import require, whole, within
from .cuttable import (
  KEPT,
  LINEAR,
  LowRank,
  cut_paths,
  groups_of,
  is_between,
  kernel_of,
  parts_of,
  start,
)
from .lora import check_rank

_TINY = 1e-8


@factory
def loraprune(
  rank: int = 8,
  alpha: float = 16,
  targets: str = LINEAR,
  sparsity: float = 0.5,
  warmup: float = 0.1,
  settle: float = 0.1,
  every: int = 10,
  beta: float = 0.9,
  skip_first: float = 0.1,
  skip_last: int = 1,
  dropout: float = 0.0,
  name: str = 'loraprune',
) -> Method:
  """LoRA that prunes the model it is trained on.

  Args:
    rank: r.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of layers with LoRA, one kernel each, by which parts are judged; the layers
      behind attention and at the end of the MLP are among them.
    sparsity: share of the parts of a layer that are pruned at the end.
    warmup: share of all updates before the first choice.
    settle: share of all updates after the last choice.
    every: updates between two choices.
    beta: of the moving average.
    skip_first: share of the layers, from the first on, that lose nothing.
    skip_last: number of layers at the end that lose nothing.
    dropout: rate on what enters a; 0.05 in the official scripts.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, layers without one kernel, or heads
      that nothing counts; in `Tuned.edit`, no number of all updates or no backbone.
  """
  check_rank(rank, dropout)
  require(alpha > 0, 'loraprune', 'alpha', alpha, 'must be greater than 0')
  require(0 <= sparsity < 1, 'loraprune', 'sparsity', sparsity, 'must lie in [0, 1)')
  within('loraprune', 'warmup', warmup, 0, 1)
  require(0 <= settle < 1 - warmup, 'loraprune', 'settle', settle, 'leaves no updates to prune in')
  whole('loraprune', 'every', every, 1)
  within('loraprune', 'beta', beta, 0, 1)
  within('loraprune', 'skip_first', skip_first, 0, 1)
  whole('loraprune', 'skip_last', skip_last, 0)
  made = _LoraPrune(
    LowRank(name, alpha / rank, dropout),
    rank,
    Schedule(sparsity, warmup, settle, every),
    beta,
    skip_first,
    skip_last,
  )
  rule = made.low_rank.rule(made.init, fixed=('*/importance',), edit=made.edit)
  return at(targets, rule)


class Schedule(NamedTuple):
  """When how much is pruned; the fields are arguments of `loraprune`."""

  sparsity: float
  warmup: float
  settle: float
  every: int

  def share(self, step, steps: int):
    """p after `step` of `steps` updates; it may be traced."""
    span = (1 - self.warmup - self.settle) * steps
    progress = jnp.clip((step - self.warmup * steps) / span, 0, 1)
    return self.sparsity * (1 - (1 - progress) ** 3)

  def chooses(self, step, steps: int):
    """Whether parts are chosen after an update."""
    last = steps - int(self.settle * steps)
    return ((step % self.every == 0) & (step < last)) | (step == last)


@dataclasses.dataclass(frozen=True, eq=False)
class _LoraPrune:
  """The rule; the fields are arguments of `loraprune`."""

  low_rank: LowRank
  rank: int
  schedule: Schedule
  beta: float
  skip_first: float
  skip_last: int

  @property
  def name(self) -> str:
    return self.low_rank.name

  def init(self, key, site: Site, arrays) -> dict:
    array = kernel_of(self.name, site)
    t = start(key, site.leaves[array], self.rank)
    parts = parts_of(self.name, site)
    if parts:
      t |= {KEPT: jnp.ones(parts, bool), 'importance': jnp.zeros(parts)}
    return {array: t}

  def edit(self, state: State, grads, step, key) -> State:
    steps = state.updates(f'{self.name}: what is pruned when')
    if state.each_layer is None:
      raise ValueError(f'{self.name}: importance reads the kernels: give Tuned.edit backbone=')
    chooses = self.schedule.chooses(step, steps)
    share = self.schedule.share(step, steps)
    theta = dict(state.theta)
    for path, members in groups_of(state.sites).items():
      ((array, t),) = theta[path].items()
      scores = sum(self.scores(state, grads, member, t[KEPT].shape[-1]) for member in members)
      importance = averaged(t['importance'], scores, self.beta)
      may = chooses & self.may_lose(state.sites[path])
      kept = t[KEPT] & (~may | chosen(importance, t[KEPT], share))
      theta[path] = {array: {**t, 'importance': importance, KEPT: kept}}
    return state._replace(theta=theta)

  def scores(self, state: State, grads, path: str, parts: int) -> jax.Array:
    """The normalised sums over the parts of a layer, [*stack, parts]."""
    site = state.sites[path]
    ((array, t),) = state.before[path].items()
    factors = {key: t[key] for key in 'ab'}
    slopes = {key: grads[path][array][key] for key in 'ab'}
    leaf = site.leaves[array]
    by_inputs = site.path in cut_paths(site)

    def of_layer(arrays, factors, slopes):
      w = leaf.fold(arrays[array]).astype(jnp.float32)
      return part_scores(w, factors, slopes, self.low_rank.scale, parts, by_inputs)

    assert state.each_layer is not None
    return state.each_layer(path, of_layer, factors, slopes)

  def may_lose(self, site: Site) -> jax.Array:
    """Whether the layers of a site are pruned at all, [*stack, 1]."""
    inside = is_between(site, int(self.skip_first * site.depth), self.skip_last)
    return jnp.asarray(inside)[..., None]


def part_scores(
  w: jax.Array, factors: Mapping, slopes: Mapping, scale: float, parts: int, by_inputs: bool
) -> jax.Array:
  """The sums of I over the parts of a layer, divided by their norm: [parts].

  Args:
    w: [fan_in, fan_out].
    factors, slopes: a and b, and their gradients.
    scale: s.
    parts: into which the inputs fall, or else the outputs.
    by_inputs: which of the two.
  """
  a, b = factors['a'], factors['b']
  da, db = slopes['a'], slopes['b']
  slope = a @ db + da @ b - da @ db
  size = jnp.abs(slope * (w + scale * (a @ b)))
  sums = size.sum(1 if by_inputs else 0).reshape(parts, -1).sum(-1)
  return sums / (jnp.linalg.norm(sums) + _TINY)


def averaged(before: jax.Array, scores: jax.Array, beta: float) -> jax.Array:
  """The moving average [..., parts]; as it was where a score of the layer is not finite."""
  finite = jnp.isfinite(scores).all(-1, keepdims=True)
  return jnp.where(finite, beta * before + (1 - beta) * scores, before)


def chosen(importance: jax.Array, kept: jax.Array, share) -> jax.Array:
  """True for all but the floor(share n) least of n parts [..., n]; pruned ones are the least."""
  n = kept.shape[-1]
  count = jnp.floor(share * n + 1e-3).astype(jnp.int32)
  order = jnp.argsort(jnp.argsort(jnp.where(kept, importance, -1.0), -1), -1)
  return order >= jnp.minimum(count, n - 1)
