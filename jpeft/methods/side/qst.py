"""Quantized side tuning: a narrow decoder beside a frozen 4-bit one, blended with its last state
before the head.

Zhang et al., 2024, "Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large
Language Models" (arXiv 2401.07159; YouAreSpecialToMe/QST). With h_0 the embeddings and h_i the
residual stream after block i,

  s <- Dn_1 h_0;  for each side layer i:  s <- z_i s + (1 - z_i) Dn_i h_i,  s <- SideBlock_i(s);
  u = U norm(s) + b,

z_i = sigmoid(g_i) a channel. Dn_1 is used twice. The frozen head reads a blend of u and the
backbone's own last state h, with one weight a channel:

  'alpha'     a h + (1 - a) u               the paper's; a starts at 1: exactly the backbone
  'code'      s(a) h + (1 - s(a)) u         the released LLaMA code, s the sigmoid; s(1) = 0.731
  'code_opt'  s(a) u + (1 - s(a)) h         the released OPT code

Dn is one of

  'adapter'   LN(swish(x A) B)              A [d, b], B [b, d']; the paper's choice
  'lora'      LN(x A B)
  'linear'    LN(x W)                       W [d, d']
  'avg'       means over groups of r neighbouring channels: no parameters, and taken before anything
              is stored
  'max'       the same with maxima

Deviations. The paper's a is read as one number a channel in all blends, as both codes have it. Side
blocks keep the backbone's own rotary positions, where the code sets their base to 10000. The
LayerNorm behind 'lora' and 'linear' is that of 'adapter'; the paper's tables do not say. The code's
dropout and `scaling` do nothing, and are left out. As `blend`, theta holds a, and for 'alpha' 1 -
a.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import reduce

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, factory

from ..check import choice
from ..nn import due_at_once, layer_norm, linear, put_stream, scales
from .ladder import BLOCKS, Ladder, ladder_at, ladder_beside
from .stack import record

# The share of u, from what theta holds: a, but 1 - a in 'alpha', since bfloat16 rounds what is near
# 1 to 1.
SHARES = {
  'alpha': lambda b: b,
  'code': lambda a: jax.nn.sigmoid(-a),
  'code_opt': lambda a: jax.nn.sigmoid(a),
}
POOLS = {'avg': 'mean', 'max': 'max'}
DOWNSAMPLES = ('adapter', 'lora', 'linear', *POOLS)


@factory
def qst(
  reduction: int = 16,
  bottleneck: int = 16,
  downsample: str = 'adapter',
  blend: str = 'alpha',
  alpha_init: float = 1.0,
  gate_init: float = 0.5,
  block: str = 'auto',
  heads: int = 1,
  layers: tuple[int, ...] | None = None,
  normalize: bool = False,
  remat: bool = True,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'qst',
) -> Method:
  """Quantized side tuning (arXiv 2401.07159). `train` and `plan` store the backbone as NF4 with
  double quantization.

  Args:
    reduction: r; the side network is as wide as the backbone divided by r.
    bottleneck: b, the inner width of 'adapter' and 'lora'.
    downsample: how states are brought to the side width, see above.
    blend: 'alpha', 'code' or 'code_opt', see above.
    alpha_init: a at the start; with 'alpha', 1 is exactly the backbone.
    gate_init: g at the start; sigmoid(0.5) = 0.622.
    block: 'own' for the backbone's block class at reduced width (Linen), 'attention' for a lean
      block with `heads` heads, 'mlp' for one without attention; 'auto' is 'own' where it works,
      else 'attention'.
    heads: of the lean block.
    layers: the backbone layers that have a side block; None for all.
    normalize: bring each state to mean 0 and variance 1 over its channels before Dn; not in the
      paper.
    remat: recompute the side blocks in the backward pass.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the module whose output the head reads, one for each stack.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its choices.
  """
  if layers is not None:
    layers = tuple(layers)
  return _QST(
    reduction=reduction,
    bottleneck=bottleneck,
    downsample=downsample,
    blend=blend,
    alpha_init=alpha_init,
    gate_init=gate_init,
    block=block,
    heads=heads,
    layers=layers,
    normalize=normalize,
    remat=remat,
    blocks=blocks,
    exit=exit,
    name=name,
  ).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _QST:
  """The hyperparameters of `qst`, and its rules as methods.

  theta[name][exit] is {'blocks', 'norm' and further tables of the ladder, 'gate': g [layers, d'],
  'down': Dn of all layers, 'up': U and b, 'blend': [d]}, those that the hyperparameters need.
  """

  reduction: int
  bottleneck: int
  downsample: str
  blend: str
  alpha_init: float
  gate_init: float
  block: str
  heads: int
  layers: tuple[int, ...] | None
  normalize: bool
  remat: bool
  blocks: str
  exit: str
  name: str

  def __post_init__(self):
    choice('qst', 'block', self.block, BLOCKS)
    choice('qst', 'downsample', self.downsample, DOWNSAMPLES)
    choice('qst', 'blend', self.blend, SHARES)
    if self.reduction < 1:
      raise ValueError(f'qst: reduction={self.reduction} must be at least 1')
    if self.bottleneck < 1:
      raise ValueError(f'qst: bottleneck={self.bottleneck} must be at least 1')

  def method(self) -> Method:
    """The blocks record their inputs; the side network runs at each exit."""
    side = Call(self.name, self.apply, self.init, taps=True, memory=NO_BACKPROP)
    return chain(
      record(self.name, self.blocks, self.tap, self.tap_inputs),
      at(self.exit, side),
    )

  @property
  def pooled(self) -> bool:
    """Whether states are brought to the side width by a pool, without parameters."""
    return self.downsample in POOLS

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
      x = reduce(x, '... (d r) -> ... d', POOLS[self.downsample], r=self.reduction)
    return x

  def tap_inputs(self, site: Site, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a block records beside its state: the inputs that its side block needs too."""
    return ladder_beside(site, self.exit, self.ladder).further(inputs)

  # The side network, at an exit.

  def init(self, key, site, arrays):
    net = self.ladder(site)
    net.check(self.name, None)
    key_a, key_b, key_kernel, key_bias, key_net = jax.random.split(key, 5)
    count = len(net.layers)
    t = net.init(key_net, arrays, None)
    t['gate'] = jnp.full((count, net.narrow), self.gate_init)
    if self.downsample == 'linear':
      t['down'] = {
        'kernel': _uniform(key_a, net.width, (count, net.width, net.narrow)),
        'norm': scales(net.narrow, count),
      }
    elif not self.pooled:
      t['down'] = {
        'a': _uniform(key_a, net.width, (count, net.width, self.bottleneck)),
        'norm': scales(net.narrow, count),
        'b': _uniform(key_b, self.bottleneck, (count, self.bottleneck, net.narrow)),
      }
    if net.is_last:
      t['up'] = {
        'kernel': _uniform(key_kernel, net.narrow, (net.narrow, net.width)),
        'bias': _uniform(key_bias, net.narrow, (net.width,)),
      }
      blend = self.alpha_init
      if self.blend == 'alpha':
        blend = 1 - blend
      t['blend'] = jnp.full((net.width,), blend, jnp.float32)
    return t

  def apply(self, t, call, x, *args, **kwargs):
    net = self.ladder(call.site)
    y = call(x, *args, **kwargs)
    out = call.site.stream(y)
    taps = call.taps()
    last = self.tap(net.last(x, out))

    first = jax.tree.map(lambda p: p[0], t.get('down'))
    s = self.down(net.embeddings(taps), first)  # [B, N, d']
    rows = {
      'gate': jax.nn.sigmoid(t['gate']),
      'h': net.each(self.down, taps, last, net.states, t.get('down')),
    }
    key = call.rng('dropout of side blocks', optional=True)
    s = net.climb(call, t, s, self.mix, rows, key, self.remat)

    if not net.is_last:  # the side decoder attends to it
      call.tap(side=s)
      return y
    u = linear(*due_at_once(t['up'], s))
    backbone = jax.lax.stop_gradient(out)
    share = SHARES[self.blend](t['blend'])
    # As a step from the backbone's state: with a share of 0 the sum is that state to the bit.
    return put_stream(call.site, y, backbone + share * (u - backbone))

  def down(self, h: jax.Array, t: Any) -> jax.Array:
    """Dn of a state [B, N, d], [B, N, d']; t is the layer's entry of 'down'. Pooled states are
    returned as they were recorded.
    """
    if self.pooled:
      return h
    if self.downsample == 'linear':
      return layer_norm(t['norm'], h @ t['kernel'], 1e-5)
    inner = h @ t['a']
    if self.downsample == 'adapter':
      inner = jax.nn.swish(inner)
    return layer_norm(t['norm'], inner @ t['b'], 1e-5)

  def mix(self, s, layer):
    """What a side block reads: z_i s + (1 - z_i) Dn_i h_i."""
    z = layer['gate']
    return z * s + (1 - z) * layer['h']


def _uniform(key: jax.Array, fan_in: int, shape: tuple[int, ...]) -> jax.Array:
  """Numbers between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)."""
  return jax.random.uniform(key, shape, minval=-1, maxval=1) * fan_in**-0.5
