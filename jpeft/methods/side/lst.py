"""Ladder side-tuning: a narrow network beside the frozen backbone, fed by its blocks.

Sung et al., 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning"
(arXiv 2206.06522). With x_0 the embeddings and h_i the residual stream after block i,

  s <- W_in x_0;  for each side layer i:  s <- g_i s + (1 - g_i) D_i h_i,  s <- SideBlock_i(s),

g_i = sigmoid(a_i / T), and the prediction reads U norm(s). No gradient enters the backbone.

In an encoder-decoder both stacks have a ladder, and the side decoder attends to the side encoder.
`merge='add'` and `merge='gate'` mix U norm(s) with the backbone's own last state; the paper's form
is 'replace'. The paper's relative position table of the side network is trained with it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, factory

from ..nn import dense, layer_norm, linear, pool, put_first
from .ladder import Ladder
from .stack import record

BLOCKS = ('auto', 'own', 'attention', 'mlp')
GATES = ('learned', None, 'one', 'linear', 'hyperbolic')
MERGES = ('replace', 'add', 'gate')
_GATE_STARTS = {'learned': 0.0, 'linear': 0.1, 'hyperbolic': 0.9}


@factory
def lst(
  reduction: int = 8,
  block: str = 'auto',
  heads: int = 1,
  downsample: str = 'linear',
  gate: str | None = 'learned',
  temperature: float = 0.1,
  gate_steps: int = 1000,
  layers: Sequence[int] | None = None,
  merge: str = 'replace',
  prune: Any = None,
  dropout: float = 0.0,
  remat: bool = True,
  std: float = 0.01,
  normalize: bool = False,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'lst',
) -> Method:
  """Ladder side-tuning (arXiv 2206.06522).

  Args:
    reduction: r; the side network is as wide as the backbone divided by r.
    block: 'own' for the backbone's block class at reduced width (Linen), 'attention' for a lean
      block with `heads` heads, 'mlp' for one without attention; 'auto' is 'own' where it works,
      else 'attention'.
    heads: of the lean block.
    downsample: 'linear' (trained, keeps the taps for its gradient) or 'pool' (means over groups of
      r features, taken before anything is stored).
    gate: 'learned', None (s + D h), 'one' (the backbone is ignored), or a schedule over training:
      'linear' (0.1 to 0.9 in `gate_steps` steps), 'hyperbolic' (1 / (1 + step / gate_steps)).
    temperature: T of the learned gates.
    gate_steps: see gate.
    layers: the backbone layers that have a side block; None for all.
    merge: 'replace', 'add' (starts as the backbone: U = 0) or 'gate'.
    prune: initial weights of own side blocks cut from the backbone: 'magnitude', or scores like the
      backbone's weights (`fisher`); None for a random start.
    dropout: on x_0.
    remat: recompute the side blocks in the backward pass: some percent more FLOPs for a fraction of
      the memory.
    std: of the initial projections.
    normalize: bring each state to mean 0 and variance 1 over its features before it is projected.
      The stream grows from block to block, so that late states drown early ones; not in the paper.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    name: in theta.
  """
  for value, choices, what in (
    (block, BLOCKS, 'block'),
    (gate, GATES, 'gate'),
    (merge, MERGES, 'merge'),
    (downsample, ('linear', 'pool'), 'downsample'),
  ):
    if value not in choices:
      raise ValueError(f'lst: {what}={value!r} is none of {", ".join(map(repr, choices))}')
  if reduction < 1:
    raise ValueError(f'lst: reduction={reduction} must be at least 1')
  if not 0 <= dropout < 1:
    raise ValueError(f'lst: dropout={dropout} must be at least 0 and below 1')
  layers = None if layers is None else tuple(layers)
  pooled = downsample == 'pool'
  if prune is not None and block not in ('auto', 'own'):
    raise ValueError("lst: prune cuts the backbone's own blocks: it needs block='own'")

  @functools.lru_cache(maxsize=256)
  def ladder(site: Site) -> Ladder:
    return Ladder(site, blocks, exit, reduction, block, heads, layers)

  @functools.lru_cache(maxsize=1024)
  def ladder_of(block_site: Site) -> Ladder:
    exits = [e for e in block_site.model.find(exit) if e.out is not None]
    return next(net for net in map(ladder, exits) if block_site in net.stack)

  def keep(x):
    x = layer_norm({}, x) if normalize else x
    return pool(x, reduction) if pooled else x

  def init(key, site, arrays):
    net = ladder(site)
    net.check(name, prune)
    keys = dict(zip(('in', 'down', 'up', 'net'), jax.random.split(key, 4), strict=True))
    t = net.init(keys['net'], arrays, prune)
    if not pooled:
      t['in'] = dense(keys['in'], net.width, net.narrow, std=std)
      if gate != 'one':
        t['down'] = dense(keys['down'], net.width, net.narrow, len(net.layers), std=std)
    if gate in _GATE_STARTS:
      t['gate'] = jnp.full((net.depth,), _GATE_STARTS[gate])
    if net.is_last:
      t['up'] = dense(keys['up'], net.narrow, net.width, std=std)
      if merge == 'add':
        t['up'] = jax.tree.map(jnp.zeros_like, t['up'])
      if merge == 'gate':
        t['merge'] = jnp.zeros(())
    return t

  def apply(t, call, x, *args, **kwargs):
    net = ladder(call.site)
    y = call(x, *args, **kwargs)
    out = jax.tree.leaves(y)[0]
    last = keep(net.last(x, out))
    key = call.rng('lst dropout') if dropout else call.key
    s = net.embeddings(call.taps())
    if dropout and key is not None:
      s = s * jax.random.bernoulli(jax.random.fold_in(key, 0), 1 - dropout, s.shape) / (1 - dropout)
    s = s if pooled else linear(t['in'], s)

    def mix(s, layer):
      h, g = layer.get('h'), layer.get('gate')
      return s if h is None else s + h if g is None else g * s + (1 - g) * h

    s = net.climb(
      call,
      t,
      s,
      mix,
      {
        **gates_of(t, net, s.dtype),
        **({} if gate == 'one' else {'h': net.narrowed(call.taps(), last, t.get('down'))}),
      },
      key,
      remat,
    )
    if not net.is_last:
      call.tap(side=s)
      return y
    o = linear(t['up'], s)
    if merge != 'replace':
      held = jax.lax.stop_gradient(out)
      g = jax.nn.sigmoid(t['merge'] / temperature) if merge == 'gate' else None
      o = held + o if g is None else g * o + (1 - g) * held
    return put_first(y, o)

  def gates_of(t, net, dtype):
    if 'gate' not in t:
      return {}
    values = jax.nn.sigmoid(t['gate'] / temperature) if gate == 'learned' else t['gate']
    return {'gate': values[jnp.array(net.layers)].astype(dtype)}

  def update(t, site, step, key):
    part = step / gate_steps
    value = 0.1 + 0.8 * part if gate == 'linear' else 1 / (1 + part)
    return {**t, 'gate': jnp.full_like(t['gate'], jnp.clip(value, 0.1, 0.9))} if 'gate' in t else t

  scheduled = gate in ('linear', 'hyperbolic')
  return chain(
    record(name, blocks, keep, lambda site, inputs: ladder_of(site).further(inputs)),
    at(
      exit,
      Call(
        name,
        apply,
        init,
        taps=True,
        memory=NO_BACKPROP,
        fixed=('gate',) if scheduled else (),
        update=update if scheduled else None,
      ),
    ),
  )


@factory
def side_tuning(
  reduction: int = 8,
  block: str = 'auto',
  heads: int = 1,
  layers: Sequence[int] | None = None,
  prune: Any = None,
  temperature: float = 1.0,
  remat: bool = False,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'side_tuning',
) -> Method:
  """Side-tuning: s(a) B(x) + (1 - s(a)) S(x) of a frozen backbone B and a small network S, s the
  sigmoid.

  Zhang et al., 2020 (arXiv 1912.13503; jozhang97/side-tuning). S is a ladder whose rungs are cut,
  as the LST paper compares with it: it reads the embeddings x_0 and no state of the backbone. theta
  holds -a as `merge`, from 0 on; a scalar, it is not decayed. `prune` starts S as a shrunken copy
  of B.

  Args:
    reduction, block, heads, layers, prune, remat, blocks, exit: see `lst`; a side block for each of
      `layers`.
    temperature: T of s(a / T); 1 as published, 0.1 in the LST paper's comparison.
    name: in theta.
  """
  return lst(
    reduction,
    block,
    heads,
    'linear',
    'one',
    temperature,
    layers=layers,
    merge='gate',
    prune=prune,
    remat=remat,
    blocks=blocks,
    exit=exit,
    name=name,
  )
