"""Light-PEFT: a short first phase says which heads, hidden units and parts of LoRA to go without.

Gu et al., 2024, "Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning" (arXiv
2406.03792); official code gccnlp/Light-PEFT. Before training, some updates train LoRA with a mask m
of one number a head, and one a hidden unit of each MLP, from 1 on:

  y = (m x) w + s (m x) a b      minimised: task + penalty (sum over heads |m| + over units |m|)

for the layers behind attention and at the end of an MLP; other layers have no m. The masks learn
at `head_rate` and `unit_rate` times the rate of LoRA. Of the second half of these updates:

  importance of a LoRA      mean over tokens of |s x a b| / |x w + bias|
  importance of its rank i  |mean over inputs of a_i da_i| + |mean over outputs of b_i db_i|

for the gradients da and db. Then goes what is least, by its value and not its size: of each layer's
heads `heads`, of the hidden units of all layers together `units`, of the LoRA of all layers
`modules`, of all ranks `ranks`. m is 1 again for what stays, and training goes on from the a and b
of the first phase, with s = alpha / r for any number of ranks. `jpeft.pruned` cuts the heads and
units off the model, as `jpeft train` does; else they are multiplied by 0.

Deviations. As many go as lie at or below the quantile of distinct values, floor(share (n - 1)) + 1,
of equal ones the first; 0 is none, and each layer keeps its largest head and hidden unit, all of
them together one LoRA and one rank. Ranks compete over all layers, also those whose LoRA goes
[the paper leaves this open]. With grouped queries a head is a key head with its group, and its mask
acts behind attention, where it is the same function. The first phase runs the model in evaluation,
without its dropout; the rate falls linearly to 0 over `updates`. What else is trained, such as the
head of a classifier, learns in the first phase too and starts anew in the second.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
  Update,
  at,
  chain,
  early_updates,
  factory,
  falling_adam,
  in_layers,
  prepared_by,
  weights_of,
)

from ..arguments import first_array, on_first
from ..check import at_least, require, whole
from ..ragged import ragged
from .cuttable import (
  HEADS,
  KEPT,
  LINEAR,
  UNITS,
  LowRank,
  as_rows,
  kernel_of,
  masked,
  parts_of,
  start,
)
from .early_pruning import (
  SecondPhase,
  decided,
  mean_of_later_half,
  moved,
  rank_importance,
  told,
)
from .lora import check_rank

_TINY = 1e-6


@factory
def light_peft(
  rank: int = 8,
  alpha: float = 16,
  targets: str = LINEAR,
  heads: float = 1 / 3,
  units: float = 1 / 3,
  modules: float = 0.75,
  ranks: float = 0.5,
  updates: int = 800,
  batch_size: int = 32,
  rate: float = 3e-4,
  penalty: float = 1e-4,
  head_rate: float = 100.0,
  unit_rate: float = 50.0,
  dropout: float = 0.0,
  name: str = 'light_peft',
) -> Method:
  """LoRA on a model that is pruned early. It waits for a pass over training examples (`prepare`).

  Args:
    rank: r in the first phase.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of layers with LoRA, one kernel each. Heads go where the layer behind attention
      is among them, hidden units where the end of the MLP is.
    heads: share of the heads of a layer that go; 0 for none, as of the next three.
    units: share of the hidden units of all layers that go.
    modules: share of the layers whose LoRA goes.
    ranks: share of all ranks that go.
    updates: of the first phase, one batch each; fewer batches are gone over again.
    batch_size: of the first phase, in `jpeft train`.
    rate: learning rate of the first phase.
    penalty: on the masks.
    head_rate, unit_rate: factors of the rate, for the masks of heads and of hidden units.
    dropout: rate on what enters a; 0.05 in the official scripts.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, layers without one kernel, or heads
      that nothing counts; in the pass, layers that are not called by themselves.
  """
  check_rank(rank, dropout)
  require(alpha > 0, 'light_peft', 'alpha', alpha, 'must be greater than 0')
  shares = {'heads': heads, 'units': units, 'modules': modules, 'ranks': ranks}
  for key, value in shares.items():
    require(0 <= value < 1, 'light_peft', key, value, 'must lie in [0, 1)')
  whole('light_peft', 'updates', updates, 2)
  whole('light_peft', 'batch_size', batch_size, 1)
  for key, value in {'penalty': penalty, 'head_rate': head_rate, 'unit_rate': unit_rate}.items():
    at_least('light_peft', key, value, 0)
  require(rate > 0, 'light_peft', 'rate', rate, 'must be greater than 0')
  made = _LightPeft(
    LowRank(name, alpha / rank, dropout),
    rank,
    targets,
    shares,
    updates,
    rate,
    penalty,
    {HEADS: head_rate, UNITS: unit_rate},
  )
  preparation = Preparation(
    'learns what to prune',
    made.find,
    made.resolved,
    told,
    size=batch_size,
    batches=updates,
    again=True,
    bound='at most so much is trained: what is pruned follows from the examples',
    moved=moved,
  )
  return prepared_by(made.first_phase(), preparation)


@dataclasses.dataclass(frozen=True, eq=False)
class _LightPeft:
  """The two phases; the fields are the arguments of `light_peft`."""

  low_rank: LowRank
  rank: int
  targets: str
  shares: Mapping[str, float]
  updates: int
  rate: float
  penalty: float
  rates: Mapping[str, float]

  @property
  def name(self) -> str:
    return self.low_rank.name

  # The first phase.

  def first_phase(self) -> Method:
    return at(self.targets, self.low_rank.rule(self.init))

  def init(self, key, site: Site, arrays) -> dict:
    array = kernel_of(self.name, site)
    leaf = site.leaves[array]
    if site.part or leaf.use != 'dot_general':
      raise ValueError(
        f'{self.name} at {site.path!r}: the importance of LoRA is measured at linear layers that '
        'are called by themselves, and this is none: name others by targets='
      )
    t = start(key, leaf, self.rank)
    parts = parts_of(self.name, site)
    if parts:
      t[KEPT] = jnp.ones(parts)
    return {array: t}

  def find(self, examples: Pass) -> dict[str, np.ndarray]:
    """Trains for a while, and decides what stays: see `early_pruning.decided`."""
    method = at(self.targets, Call(self.name, self.learned, self.init))
    if examples.layers is not None:
      method = in_layers(method, examples.layers)
    root = at('', Call(self.name, _with_tokens, takes=(_TOKENS,)))
    tuned = examples.attached(chain(root, method, examples.beside))
    theta = jax.jit(tuned.init)(examples.key, examples.backbone)
    sites = {path: tuned.site_of(self.name, path) for path in theta[self.name]}
    heads = {site.path for site in examples.sites.find(HEADS)}

    def factor(path) -> float:
      if path[0] != self.name or path[-1] != KEPT:
        return 1.0
      return self.rates[HEADS if path[1] in heads else UNITS]

    history: list[dict[str, np.ndarray]] = []
    for now, scores in early_updates(
      examples,
      tuned,
      theta,
      falling_adam(self.rate, self.updates, factor),
      steps=self.updates,
      penalty=lambda theta: self.penalty * size_of_masks(theta[self.name]),
      read=self.scores,
      takes=lambda batch: {_TOKENS: weights_of(batch)},
    ):
      history.append(examples.fetch(scores))
      theta = now
    own = examples.fetch(theta[self.name])
    return decided(own, mean_of_later_half(history), sites, heads, self.shares)

  def learned(self, t, call, *args, **kwargs):
    """A layer in the first phase; it also gives the mean size of LoRA beside it."""
    ((array, own),) = t.items()
    leaf = call.site.leaves[array]
    x = first_array(call, args, kwargs)
    if KEPT in own:
      x = masked(x, own[KEPT], leaf.fan_in)
      args, kwargs = on_first(call, args, kwargs, lambda _: x)
    out = call(*args, **kwargs)
    y = call.site.stream(out)
    low = as_rows(x, leaf.fan_in) @ own['a']
    added = self.low_rank.scale * (low @ own['b'])  # [..., fan_out]
    sizes = [
      jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)
      for rows in (added, as_rows(y, leaf.fan_out))
    ]
    ratio = sizes[0] / jnp.maximum(sizes[1], _TINY)
    call.aux(**{_measured(call.site.path): _mean(ratio, call.root['tokens'])})
    return call.site.map_stream(out, lambda y: y + added.reshape(y.shape).astype(y.dtype))

  def scores(self, update: Update) -> dict[str, jax.Array]:
    """{'rank path' and 'module path': importances of one update}."""
    found = {}
    for path, arrays in update.theta[self.name].items():
      for array, t in arrays.items():
        found[f'rank {path}'] = rank_importance(t, update.grads[self.name][path][array])
        found[f'module {path}'] = update.aux[_measured(path)]
    return found

  # The second phase.

  def resolved(self, found: Found) -> Method:
    """LoRA of the ranks that stayed, and masks of 0 and 1 unless the model was cut."""
    second = SecondPhase.of(found)
    return ragged(at(self.targets, self.low_rank.rule(second.init)), second.live())


def size_of_masks(own: Mapping[str, Any]) -> jax.Array:
  """The sum of |m| over all masks of {path: {array: t}}."""
  masks = [t[KEPT] for arrays in own.values() for t in arrays.values() if KEPT in t]
  return sum((jnp.abs(m).sum() for m in masks), jnp.zeros(()))


_TOKENS = 'light_peft_tokens'


def _with_tokens(t, call, *args, light_peft_tokens=None, **kwargs):
  """At the model: hands to all layers how much each token counts."""
  call.local['tokens'] = light_peft_tokens
  return call(*args, **kwargs)


def _mean(ratio: jax.Array, tokens: jax.Array | None) -> jax.Array:
  """The mean of [B, ...] over what counts: tokens [B, N], or examples [B]."""
  if tokens is None:
    return ratio.mean()
  if tokens.ndim == 2 and ratio.shape[:2] != tokens.shape:
    tokens = tokens.max(-1)  # of another sequence
  weights = tokens.reshape(*tokens.shape, *(1,) * (ratio.ndim - tokens.ndim))
  weights = jnp.broadcast_to(weights, ratio.shape)
  return (weights * ratio).sum() / jnp.maximum(weights.sum(), 1)


def _measured(path: str) -> str:
  """The name of the measured importance of the LoRA of a layer."""
  return f'importance of {path}'
