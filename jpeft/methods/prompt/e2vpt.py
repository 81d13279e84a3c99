"""E2VPT: prompts among the tokens, further keys and values in the attention, and pruned prompts.

Han et al., 2023 (arXiv 2307.13770); official code ChengHan111/E2VPT. Every block gets p prompts P_i
[p, D], as in VPT-deep, and every attention n rows K_i, V_i [n, heads, head size] in front of its
keys and values, which all queries see; `share` makes V_i = K_i, the official default. With two
masks that all layers share, m_t [p] of tokens and m_s [p, S] of segments, the prompts are

  P_i[j, c] m_t[j] m_s[j, c mod S]

so segment s has the channels s, s + S, s + 2 S, ... They are masked before dropout.

Pruning. For the first `prune_after` updates the masks are 1 and the gradients of the loss for their
entries are averaged, with their signs, while the prompts train. Then the lowest entries become 0: a
share `prune_tokens` of the tokens, at least one of which stays, and of each token a share
`prune_segments` of its segments, at least four of which stay. Prompts and rows go back to their
start (rewinding), the optimizer's moments to zero, and training goes on under the masks. The shares
are chosen by runs of their own, on data that is not tested on.

Prompts start as those of VPT, rows as U(-a, a), a = sqrt(6 / (n head size)), 0.137 for n = 5 and
64. The function does not start as the backbone. Not mergeable.

Deviations. The masks take no steps of the optimizer; in the official code they train as well. Its
learning rate starts anew after rewinding, and here it goes on. Segments are ranked within their
token. A masked prompt is a zero vector: it still takes its share of the attention. Where blocks
start with a norm, which undoes a factor of a whole token, the gradient for m_t is near 0 and ranks
tokens by little more than rounding: prune segments there.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Site, State, at, chain, factory

from ..arguments import first_array
from ..check import require, whole, within
from ..keys import more_keys
from ..nn import uniform
from ..tokens import Tokens
from .vpt import dropped, init_prompts

# What stays at least.
LEAST_TOKENS = 1
LEAST_SEGMENTS = 4
_MASKS = ('tokens', 'segments')


@factory
def e2vpt(
  tokens: int = 10,
  kv_tokens: int = 5,
  share: bool = True,
  dropout: float = 0.1,
  prune_tokens: float = 0.0,
  prune_segments: float = 0.0,
  prune_after: int = 0,
  segments: int = 16,
  blocks: str = '{block}',
  targets: str = '{attention}',
  name: str = 'e2vpt',
) -> Method:
  """Prompts in every block, keys and values in every attention, and their pruning.

  Args:
    tokens: p.
    kv_tokens: n.
    share: whether keys and values have the same rows.
    dropout: rate on the entries of the prompts.
    prune_tokens: share of the prompts that become 0.
    prune_segments: share of the segments of each prompt that become 0.
    prune_after: updates before that happens, which a run must exceed; needed with either share.
    segments: S.
    blocks: pattern of the blocks.
    targets: pattern of the modules that compute attention, see `prefix`.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a block that reads no token
      sequence, or a module whose attention is out of reach.
  """
  whole('e2vpt', 'tokens', tokens, 0)
  whole('e2vpt', 'kv_tokens', kv_tokens, 0)
  whole('e2vpt', 'segments', segments, 1)
  whole('e2vpt', 'prune_after', prune_after, 0)
  within('e2vpt', 'dropout', dropout, 0, 1)
  within('e2vpt', 'prune_tokens', prune_tokens, 0, 1)
  within('e2vpt', 'prune_segments', prune_segments, 0, 1)
  prunes = max(prune_tokens, prune_segments) > 0
  rule = 'must be at least 1 where prune_tokens or prune_segments is above 0, and 0 elsewhere'
  require(prunes == (prune_after > 0), 'e2vpt', 'prune_after', prune_after, rule)
  require(tokens > 0 or not prunes, 'e2vpt', 'tokens', tokens, 'leaves nothing to prune')
  pruning = None
  if prunes:
    pruning = Pruning(tokens, segments, prune_tokens, prune_segments, prune_after)
  return _E2vpt(tokens, kv_tokens, share, dropout, pruning, blocks, targets, name).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _E2vpt:
  """The rules of `e2vpt`; the fields are its arguments."""

  tokens: int
  kv_tokens: int
  share: bool
  dropout: float
  pruning: 'Pruning | None'
  blocks: str
  targets: str
  name: str

  def method(self) -> Method:
    rules = []
    start = ()
    if self.pruning is not None:
      start = ('start',)
      rules.append(at('', self.pruning.rule(self.name)))
    if self.tokens:
      prompts = Call(self.name, self.prompt, self.init_block, fixed=start)
      rules.append(at(self.blocks, prompts))
    if self.kv_tokens:
      rows = Call(self.name, self.attend, self.init_rows, fixed=start, requires='attention')
      rules.append(at(self.targets, rows))
    return chain(*rules)

  def with_start(self, t: dict) -> dict:
    """theta of a site, with what it goes back to."""
    if self.pruning is None:
      return t
    return {**t, 'start': dict(t)}

  def init_block(self, key, site: Site, arrays) -> dict:
    return self.with_start(init_prompts(key, self.tokens, site, site.input))

  def prompt(self, t, call, *args, **kwargs):
    """Runs a block with the prompts among its tokens."""
    inserted = Tokens(self.tokens)
    prompts = t['prompts']
    if self.pruning is not None:
      masks = (call.root[mask].astype(prompts.dtype) for mask in _MASKS)
      prompts = masked(prompts, *masks)
    x = first_array(call, args, kwargs)
    new = dropped(prompts, call, self.dropout, x)
    args, kwargs = inserted.enter(call, args, kwargs, new)
    out, _ = inserted.leave(call, call(*args, **kwargs))
    return out

  def init_rows(self, key, site: Site, arrays) -> dict:
    shape = (self.kv_tokens, *site.heads)
    bound = math.sqrt(6 / (self.kv_tokens * site.heads[-1]))
    names = ('rows',) if self.share else ('keys', 'values')
    keys = jax.random.split(key, len(names))
    drawn = {part: uniform(k, shape, bound) for part, k in zip(names, keys, strict=True)}
    return self.with_start(drawn)

  def attend(self, t, call, *args, **kwargs):
    """Runs an attention module with the rows in front of its keys and values."""
    keys, values = (t['rows'], t['rows']) if self.share else (t['keys'], t['values'])

    def wrap(attention_fn):
      return more_keys(attention_fn, keys, values)

    return call.attend(wrap, *args, **kwargs)


def masked(prompts: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
  """Prompts [p, D] times the mask of tokens [p] and that of segments [p, S]."""
  channels = jnp.arange(prompts.shape[-1]) % segments.shape[-1]
  return prompts * tokens[:, None] * segments[:, channels]


# Pruning


@dataclasses.dataclass(frozen=True)
class Pruning:
  """The masks: how they are measured, and what happens after `after` updates.

  Attributes:
    tokens: p.
    segments: S.
    share_tokens: of the tokens that become 0.
    share_segments: of the segments of a token that become 0.
    after: updates.
  """

  tokens: int
  segments: int
  share_tokens: float
  share_segments: float
  after: int

  def rule(self, name: str) -> Call:
    """At the model: hands the masks to all blocks."""
    fixed = ('importance',)
    stages = ((self.after, (*fixed, *_MASKS)),)
    return Call(name, self.share_out, self.init, fixed=fixed, edit=self, stages=stages)

  def init(self, key, site: Site, arrays) -> dict:
    masks = {'tokens': jnp.ones(self.tokens), 'segments': jnp.ones((self.tokens, self.segments))}
    return {**masks, 'importance': jax.tree.map(jnp.zeros_like, masks)}

  @staticmethod
  def share_out(t, call, *args, **kwargs):
    call.local.update({mask: t[mask] for mask in _MASKS})
    return call(*args, **kwargs)

  def __call__(self, state: State, grads, step, key) -> State:
    """Holds the masks still, averages their gradients, and prunes in the last update."""
    if grads['']['tokens'] is None:  # in the second stage
      return state
    old = state.before['']
    importance = {}
    for mask in _MASKS:
      importance[mask] = old['importance'][mask] + grads[''][mask] / self.after
    masks = {mask: old[mask] for mask in _MASKS}
    theta = {**state.theta, '': {**masks, 'importance': importance}}
    going_on = state._replace(theta=theta)

    def pruned():
      rewound = {path: _at_start(t) for path, t in theta.items()}
      rewound[''] = {**self.masks(importance), 'importance': importance}
      moments = jax.tree.map(jnp.zeros_like, state.moments)
      return going_on._replace(theta=rewound, moments=moments)

    return jax.lax.cond(step == self.after, pruned, lambda: going_on)

  def masks(self, importance: Mapping) -> dict:
    """The masks without the entries of least importance."""
    tokens = _without(importance['tokens'], self.share_tokens, LEAST_TOKENS)
    segments = _without(importance['segments'], self.share_segments, LEAST_SEGMENTS)
    return {'tokens': tokens, 'segments': segments}


def _without(importance: jax.Array, share: float, least: int) -> jax.Array:
  """1, and 0 for a share of the entries along the last axis, the lowest; `least` of them stay."""
  size = importance.shape[-1]
  wanted = math.floor(share * size + 1e-6)  # 0.29 of 100 are 29
  count = max(min(wanted, size - least), 0)
  rank = jnp.argsort(jnp.argsort(importance, -1), -1)
  return (rank >= count).astype(importance.dtype)


def _at_start(t: Mapping) -> dict:
  """theta of a site as it began."""
  if 'start' not in t:
    return dict(t)
  return {**t['start'], 'start': t['start']}
