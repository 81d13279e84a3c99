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

from ..core import Call, Method, Site, at, chain
from .ladder import Ladder, pool
from .tune import NONE

BLOCKS = ('auto', 'own', 'attention', 'mlp')
GATES = ('learned', None, 'one', 'linear', 'hyperbolic')
MERGES = ('replace', 'add', 'gate')
_GATE_STARTS = {'learned': 0.0, 'linear': 0.1, 'hyperbolic': 0.9}


def lst(reduction: int = 8, block: str = 'auto', heads: int = 1, downsample: str = 'linear',
        gate: str | None = 'learned', temperature: float = 0.1, gate_steps: int = 1000,
        layers: Sequence[int] | None = None, merge: str = 'replace', prune: Any = None,
        dropout: float = 0.0, remat: bool = True, std: float = 0.01, blocks: str = '{block}',
        exit: str = '{exit}', name: str = 'lst') -> Method:
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
    remat: recompute the side blocks in the backward pass: some percent more FLOPs for a fraction of the memory.
    std: of the initial projections.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    name: in theta.
  """
  for value, choices, what in ((block, BLOCKS, 'block'), (gate, GATES, 'gate'), (merge, MERGES, 'merge'),
                               (downsample, ('linear', 'pool'), 'downsample')):
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

  def record(t, call, *args, **kwargs):
    inputs = {n: _still(a) for n, a in call.inputs(*args, **kwargs).items()}
    net, x = ladder_of(call.site), next(iter(inputs.values()))
    if pooled:
      x = pool(x, reduction)
      if not net.scanned and args and isinstance(args[0], jax.Array):
        # The block waits for it, lest XLA pools after the last block and keeps all wide taps until then.
        x, first = jax.lax.optimization_barrier((x, args[0]))
        args = (first, *args[1:])
    call.tap(x=x, **net.recorded(inputs))
    return call(*args, **kwargs)

  def init(key, site, arrays):
    net = ladder(site)
    net.check(prune)
    keys = dict(zip(('in', 'down', 'up', 'net'), jax.random.split(key, 4), strict=True))

    def project(name, fan_in, fan_out, *lead):
      kernel = std * jax.random.normal(keys[name], (*lead, fan_in, fan_out))
      return {'kernel': kernel, 'bias': jnp.zeros((*lead, fan_out))}

    t = net.init(keys['net'], arrays, prune)
    if not pooled:
      t['in'] = project('in', net.width, net.narrow)
      t['down'] = project('down', net.width, net.narrow, len(net.layers))
    if gate in _GATE_STARTS:
      t['gate'] = jnp.full((net.depth,), _GATE_STARTS[gate])
    if net.is_last:
      t['up'] = project('up', net.narrow, net.width)
      if merge == 'add':
        t['up'] = jax.tree.map(jnp.zeros_like, t['up'])
      if merge == 'gate':
        t['merge'] = jnp.zeros(())
    return t

  def apply(t, call, x, *args, **kwargs):
    net = ladder(call.site)
    y = call(x, *args, **kwargs)
    out = jax.tree.leaves(y)[0]
    last = jax.lax.stop_gradient(out if net.wraps_blocks else x)
    last = pool(last, reduction) if pooled else last
    key = call.rng('lst dropout') if dropout else call.key
    s = net.embeddings(call.taps())
    if dropout and key is not None:
      s = s * jax.random.bernoulli(jax.random.fold_in(key, 0), 1 - dropout, s.shape) / (1 - dropout)
    s = s if pooled else _linear(t['in'], s)
    with call.outside():
      context = net.context(t, call.taps(), s.shape[1])

    def step(s, layer):
      h, g = layer['h'], layer.get('gate')
      s = s + h if g is None else g * s + (1 - g) * h
      with call.outside():
        out = net.block.apply(layer['block'], s, {**layer['inputs'], **context}, call.training, layer.get('key'))
      return out.astype(s.dtype), None

    # The side network is scanned beside unrolled blocks too: its activations are then stored once and narrow,
    # where XLA would hold those of many layers at a time, and it compiles once.
    inputs = net.inputs(call.taps())
    context |= {n: x[0] for n, x in inputs.items() if isinstance(x, list) and all(row is x[0] for row in x)}
    layers = {
      'h': net.narrowed(call.taps(), last, t.get('down')), 'block': t['blocks'],
      'inputs': {n: x for n, x in inputs.items() if n not in context}, **gates_of(t, net, s.dtype),
      **({} if key is None else {'key': jax.random.split(key, len(net.layers))})}
    is_list = lambda x: isinstance(x, list)
    layers = jax.tree.map(lambda x: jnp.stack(x) if is_list(x) else x, layers, is_leaf=is_list)
    s, _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if remat else step, s, layers)
    with call.outside():
      s = net.norm(t, s)
    if not net.is_last:
      call.tap(side=s)
      return y
    o = _linear(t['up'], s)
    if merge != 'replace':
      held = jax.lax.stop_gradient(out)
      g = jax.nn.sigmoid(t['merge'] / temperature) if merge == 'gate' else None
      o = held + o if g is None else g * o + (1 - g) * held
    return jax.tree.map(lambda a: o.astype(a.dtype) if a is out else a, y)

  def gates_of(t, net, dtype):
    if gate is None:
      return {}
    values = t['gate'] if gate != 'one' else jnp.ones(net.depth)
    values = jax.nn.sigmoid(values / temperature) if gate == 'learned' else values
    return {'gate': values[jnp.array(net.layers)].astype(dtype)}

  def update(t, site, step, key):
    part = step / gate_steps
    value = 0.1 + 0.8 * part if gate == 'linear' else 1 / (1 + part)
    return {**t, 'gate': jnp.full_like(t['gate'], jnp.clip(value, 0.1, 0.9))} if 'gate' in t else t

  scheduled = gate in ('linear', 'hyperbolic')
  return chain(
    at(blocks, Call(name, record, taps=True, memory=NONE)),
    at(exit, Call(name, apply, init, taps=True, memory=NONE, fixed=('gate',) if scheduled else (),
                  update=update if scheduled else None)))


def _still(x: jax.Array) -> jax.Array:
  """x without gradient; what has none, such as a mask that all blocks share, stays the very same array."""
  return jax.lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _linear(t, x: jax.Array) -> jax.Array:
  return x @ t['kernel'] + t['bias']
