"""Quantized side tuning: a narrow decoder beside a frozen 4-bit one, blended with its last state
before the head.

Zhang et al., 2024, "Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large
Language Models" (arXiv 2401.07159; YouAreSpecialToMe/QST). With h_0 the embeddings and h_i the
residual stream after block i,

  s <- Dn_1 h_0;  for each side layer i:  s <- z_i s + (1 - z_i) Dn_i h_i,  s <- SideBlock_i(s);  u = U norm(s) + b,

z_i = sigmoid(g_i) a channel. Dn_1 is used twice. The frozen head reads a blend of u and the
backbone's own last state h, with one weight a channel:

  'alpha'     a h + (1 - a) u               the paper's; a starts at 1: exactly the backbone
  'code'      s(a) h + (1 - s(a)) u         the released LLaMA code, s the sigmoid; s(1) = 0.731
  'code_opt'  s(a) u + (1 - s(a)) h         the released OPT code

Dn is one of

  'adapter'   LN(swish(x A) B)              A [d, b], B [b, d']; the paper's choice
  'lora'      LN(x A B)
  'linear'    LN(x W)                       W [d, d']
  'avg'       means over groups of r neighbouring channels: no parameters, and taken before anything is stored
  'max'       the same with maxima

Deviations. The paper's a is read as one number a channel in all blends, as both codes have it. Side
blocks keep the backbone's own rotary positions, where the code sets their base to 10000. The
LayerNorm behind 'lora' and 'linear' is that of 'adapter'; the paper's tables do not say. The code's
dropout and `scaling` do nothing, and are left out. As `blend`, theta holds a, and for 'alpha' 1 -
a.
"""

import functools

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, factory

from ..nn import layer_norm, linear, put_first, scales
from .ladder import Ladder
from .stack import record

# The share of u, from what theta holds: a, but 1 - a in 'alpha', lest bfloat16 rounds what is near
# 1 to 1.
SHARES = {'alpha': lambda b: b, 'code': lambda a: jax.nn.sigmoid(-a), 'code_opt': jax.nn.sigmoid}
POOLS = {'avg': jnp.mean, 'max': jnp.max}
DOWNSAMPLES = ('adapter', 'lora', 'linear', *POOLS)
BLOCKS = ('auto', 'own', 'attention', 'mlp')


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
  for value, choices, what in (
    (block, BLOCKS, 'block'),
    (downsample, DOWNSAMPLES, 'downsample'),
    (blend, SHARES, 'blend'),
  ):
    if value not in choices:
      raise ValueError(f'qst: {what}={value!r} is none of {", ".join(map(repr, choices))}')
  for value, what in ((reduction, 'reduction'), (bottleneck, 'bottleneck')):
    if value < 1:
      raise ValueError(f'qst: {what}={value} must be at least 1')
  layers = None if layers is None else tuple(layers)
  pooled = downsample in POOLS

  @functools.lru_cache(maxsize=256)
  def ladder(site: Site) -> Ladder:
    return Ladder(site, blocks, exit, reduction, block, heads, layers)

  @functools.lru_cache(maxsize=1024)
  def ladder_of(block_site: Site) -> Ladder:
    exits = [e for e in block_site.model.find(exit) if e.out is not None]
    return next(net for net in map(ladder, exits) if block_site in net.stack)

  def keep(x):
    x = layer_norm({}, x) if normalize else x
    return POOLS[downsample](x.reshape(*x.shape[:-1], -1, reduction), -1) if pooled else x

  def down(h, t):
    """Dn of a state [B, N, d], [B, N, d']."""
    if pooled:
      return h
    if downsample == 'linear':
      return layer_norm(t['norm'], h @ t['kernel'], 1e-5)
    h = h @ t['a']
    return layer_norm(t['norm'], (jax.nn.swish(h) if downsample == 'adapter' else h) @ t['b'], 1e-5)

  def init(key, site, arrays):
    net = ladder(site)
    net.check(name, None)
    keys = dict(zip(('a', 'b', 'kernel', 'bias', 'net'), jax.random.split(key, 5), strict=True))
    drawn = lambda n, fan_in, *shape: (
      jax.random.uniform(keys[n], shape, minval=-1, maxval=1) * fan_in**-0.5
    )
    wide, narrow, count = net.width, net.narrow, len(net.layers)
    t = {**net.init(keys['net'], arrays, None), 'gate': jnp.full((count, narrow), gate_init)}
    if downsample == 'linear':
      t['down'] = {'kernel': drawn('a', wide, count, wide, narrow), 'norm': scales(narrow, count)}
    elif not pooled:
      t['down'] = {
        'a': drawn('a', wide, count, wide, bottleneck),
        'norm': scales(narrow, count),
        'b': drawn('b', bottleneck, count, bottleneck, narrow),
      }
    if net.is_last:
      t['up'] = {
        'kernel': drawn('kernel', narrow, narrow, wide),
        'bias': drawn('bias', narrow, wide),
      }
      t['blend'] = jnp.full(
        (wide,), 1 - alpha_init if blend == 'alpha' else alpha_init, jnp.float32
      )
    return t

  def apply(t, call, x, *args, **kwargs):
    net = ladder(call.site)
    y = call(x, *args, **kwargs)
    out, taps = jax.tree.leaves(y)[0], call.taps()
    last = keep(net.last(x, out))
    s = down(net.embeddings(taps), jax.tree.map(lambda a: a[0], t.get('down')))
    mix = lambda s, layer: layer['gate'] * s + (1 - layer['gate']) * layer['h']
    s = net.climb(
      call,
      t,
      s,
      mix,
      {
        'gate': jax.nn.sigmoid(t['gate']),
        'h': net.each(down, taps, last, [i + 1 for i in net.layers], t.get('down')),
      },
      call.key,
      remat,
    )
    if not net.is_last:
      call.tap(side=s)
      return y
    still = jax.lax.stop_gradient(out)
    return put_first(y, still + SHARES[blend](t['blend']) * (linear(t['up'], s) - still))

  return chain(
    record(name, blocks, keep, lambda site, inputs: ladder_of(site).further(inputs)),
    at(exit, Call(name, apply, init, taps=True, memory=NO_BACKPROP)),
  )
