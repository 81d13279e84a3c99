"""Ladder side-tuning: a narrow network beside the frozen backbone, fed by its blocks.

Sung et al., 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning"
(arXiv 2206.06522). With x_0 the embeddings and h_i the residual stream after block i,

  s <- W_in x_0;  for each side layer i:  s <- g_i s + (1 - g_i) D_i h_i,  s <- SideBlock_i(s),

g_i = sigmoid(a_i / T), and the prediction reads U norm(s). No gradient enters the backbone.

In an encoder-decoder both stacks have a ladder, and the side decoder attends to the side encoder.
`merge='add'` and `merge='gate'` mix U norm(s) with the backbone's own last state; the paper's form
is 'replace'. The paper's relative position table of the side network is trained with it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, factory

from ..check import choice
from ..nn import dense, drop, due_at_once, layer_norm, linear, pool, put_stream
from .ladder import BLOCKS, Ladder, ladder_at, ladder_beside
from .stack import record

GATES = ('learned', None, 'one', 'linear', 'hyperbolic')
MERGES = ('replace', 'add', 'gate')
DOWNSAMPLES = ('linear', 'pool')
# What `gate` in theta is at first: a_i of learned gates, else g_i itself.
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
  if layers is not None:
    layers = tuple(layers)
  return _LST(
    reduction=reduction,
    block=block,
    heads=heads,
    downsample=downsample,
    gate=gate,
    temperature=temperature,
    gate_steps=gate_steps,
    layers=layers,
    merge=merge,
    prune=prune,
    dropout=dropout,
    remat=remat,
    std=std,
    normalize=normalize,
    blocks=blocks,
    exit=exit,
    name=name,
  ).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _LST:
  """The hyperparameters of `lst`, and its rules as methods.

  theta[name][exit] is {'blocks', 'norm' and further tables of the ladder, 'in': W_in, 'down': all
  D_i, 'gate': [backbone layers], 'up': U, 'merge': a scalar}, those that the hyperparameters need.
  """

  reduction: int
  block: str
  heads: int
  downsample: str
  gate: str | None
  temperature: float
  gate_steps: int
  layers: tuple[int, ...] | None
  merge: str
  prune: Any
  dropout: float
  remat: bool
  std: float
  normalize: bool
  blocks: str
  exit: str
  name: str

  def __post_init__(self):
    choice('lst', 'block', self.block, BLOCKS)
    choice('lst', 'gate', self.gate, GATES)
    choice('lst', 'merge', self.merge, MERGES)
    choice('lst', 'downsample', self.downsample, DOWNSAMPLES)
    if self.reduction < 1:
      raise ValueError(f'lst: reduction={self.reduction} must be at least 1')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'lst: dropout={self.dropout} must be at least 0 and below 1')
    if self.prune is not None and self.block not in ('auto', 'own'):
      raise ValueError("lst: prune cuts the backbone's own blocks: it needs block='own'")

  def method(self) -> Method:
    """The blocks record their inputs; the side network runs at each exit."""
    options = {}
    if self.gate in ('linear', 'hyperbolic'):  # a schedule: not trained
      options = {'fixed': ('gate',), 'update': self.update}
    side = Call(self.name, self.apply, self.init, taps=True, memory=NO_BACKPROP, **options)
    return chain(
      record(self.name, self.blocks, self.tap, self.tap_inputs),
      at(self.exit, side),
    )

  @property
  def pooled(self) -> bool:
    """Whether states are brought to the side width by means, without parameters."""
    return self.downsample == 'pool'

  def ladder(self, site: Site) -> Ladder:
    """The side network at an exit."""
    return ladder_at(
      site, self.blocks, self.exit, self.reduction, self.block, self.heads, self.layers
    )

  # What blocks record.

  def tap(self, x: jax.Array) -> jax.Array:
    """What is recorded of a state [B, N, d]: itself, or pooled [B, N, d / r]."""
    if self.normalize:
      x = layer_norm({}, x)
    if self.pooled:
      x = pool(x, self.reduction)
    return x

  def tap_inputs(self, site: Site, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a block records beside its state: the inputs that its side block needs too."""
    return ladder_beside(site, self.exit, self.ladder).further(inputs)

  # The side network, at an exit.

  def init(self, key, site, arrays):
    net = self.ladder(site)
    net.check(self.name, self.prune)
    key_in, key_down, key_up, key_net = jax.random.split(key, 4)
    t = net.init(key_net, arrays, self.prune)
    if not self.pooled:
      t['in'] = dense(key_in, net.width, net.narrow, std=self.std)
      if self.gate != 'one':
        t['down'] = dense(key_down, net.width, net.narrow, len(net.layers), std=self.std)
    if self.gate in _GATE_STARTS:
      t['gate'] = jnp.full((net.depth,), _GATE_STARTS[self.gate])
    if net.is_last:
      t['up'] = dense(key_up, net.narrow, net.width, std=self.std)
      if self.merge == 'add':
        t['up'] = jax.tree.map(jnp.zeros_like, t['up'])
      if self.merge == 'gate':
        t['merge'] = jnp.zeros(())
    return t

  def apply(self, t, call, x, *args, **kwargs):
    net = self.ladder(call.site)
    y = call(x, *args, **kwargs)
    out = call.site.stream(y)
    taps = call.taps()

    s = net.embeddings(taps)  # [B, N, d], or [B, N, d'] if pooled
    # The side blocks may have a dropout of their own, without which they need no key.
    key = call.rng('lst dropout', optional=not self.dropout)
    if self.dropout and key is not None:
      s = drop(s, jax.random.fold_in(key, 0), self.dropout)
    if not self.pooled:
      s = linear(t['in'], s)

    rows = {}
    if 'gate' in t:
      rows['gate'] = self.gates(t, net).astype(s.dtype)
    if self.gate != 'one':
      last = self.tap(net.last(x, out))
      rows['h'] = net.narrowed(taps, last, t.get('down'))
    s = net.climb(call, t, s, self.mix, rows, key, self.remat)

    if not net.is_last:  # the side decoder attends to it
      call.tap(side=s)
      return y
    u = linear(*due_at_once(t['up'], s))
    return put_stream(call.site, y, self.merged(t, u, jax.lax.stop_gradient(out)))

  def gates(self, t, net: Ladder) -> jax.Array:
    """g_i of each side layer."""
    values = t['gate']
    if self.gate == 'learned':
      values = jax.nn.sigmoid(values / self.temperature)
    return values[jnp.array(net.layers)]

  def mix(self, s, layer):
    """What a side block reads: g_i s + (1 - g_i) D_i h_i."""
    if 'h' not in layer:
      return s
    h = layer['h']
    if 'gate' not in layer:
      return s + h
    g = layer['gate']
    return g * s + (1 - g) * h

  def merged(self, t, side: jax.Array, backbone: jax.Array) -> jax.Array:
    """The last state that the model goes on with, of U norm(s) and of the backbone's own."""
    if self.merge == 'replace':
      return side
    if self.merge == 'add':
      return backbone + side
    g = jax.nn.sigmoid(t['merge'] / self.temperature)
    return g * side + (1 - g) * backbone

  def update(self, t, site, step, key):
    """The gates that the schedule gives after `step` updates."""
    part = step / self.gate_steps
    if self.gate == 'linear':
      value = 0.1 + 0.8 * part
    else:
      value = 1 / (1 + part)
    return {**t, 'gate': jnp.full_like(t['gate'], jnp.clip(value, 0.1, 0.9))}


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
    reduction=reduction,
    block=block,
    heads=heads,
    gate='one',
    temperature=temperature,
    layers=layers,
    merge='gate',
    prune=prune,
    remat=remat,
    blocks=blocks,
    exit=exit,
    name=name,
  )
