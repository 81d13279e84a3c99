"""SHERL: states of the frozen backbone are merged, and the merged one goes through the last frozen
block.

Diao et al., 2024, "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited
Transfer Learning" (arXiv 2407.07523; Paranioar/SHERL). With h_1 .. h_n [B, N, d] the embeddings and
the outputs of some blocks before the last one, n the deepest, everything a token alone:

  u_i = Down_i h_i                          gated: r = ReLU(W1 h), (W2 r + r) * s(W3 r); norm: LN(W h)
  R_i = sum_j ReLU(cos(u_i, u_j)),  a_i = L1_i(ReLU(w . (u_i * u_n)) / R_i),  v = sum_i a_i u_i + u_n     i, j < n
  x = Up ReLU(v) + tanh(g / T) h_last,  out = Norm(LastBlock(x))

linear: Up x = W x; norm: Up x = LN(W x). g starts at 0, so that at first the last block sees the
merged state alone; Norm is new and trained, where the backbone has a norm behind its blocks.

What crosses the backbone. The backward pass runs through one frozen block, the last, with respect
to its input; the states before it are constants. What it keeps: that block's inside, the states
(inputs of the W1), and n projections of width m, whatever the depth. The block runs twice, once as
the backbone's own.

In an encoder-decoder the encoder is not entered again: its merged states (the last block's among
them, h_last is what leaves that) are a second memory, which the last decoder block alone attends
to, run again on the decoder's x. The earlier ones read the frozen encoder. T5 uses 'gated' and
'linear', the text tower of VSE infinity 'norm' and 'norm'. The applications on feature maps, and
CLIP4Clip's, which enters no block again, are left out.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jpeft.core import PARTIAL_REENTRY, Call, Method, Site, at, chain, factory

from ..nn import dense, drop, layer_norm, linear, put_first, rms_norm, scales
from .stack import Stack, record

DOWNS, UPS = ('gated', 'norm'), ('linear', 'norm')


@factory
def sherl(
  reduction: int = 8,
  width: int | None = None,
  down: str = 'gated',
  up: str = 'linear',
  layers: Sequence[int] | None = None,
  temperature: float = 0.1,
  dropout: float = 0.0,
  std: float = 0.01,
  remat: bool = False,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'sherl',
) -> Method:
  """SHERL (arXiv 2407.07523).

  Args:
    reduction: d / m.
    width: m itself.
    down: 'gated' or 'norm'.
    up: 'linear' or 'norm'.
    layers: the layers whose outputs are merged, None for all; the last counts in an encoder alone
      that feeds a decoder. The embeddings always are.
    temperature: T.
    dropout: rate on what is merged, after Up.
    std: of the initial weights of 'gated' and 'linear'.
    remat: recompute the projections in the backward pass.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model without one stream of
      tokens, or whose only block is the last.
  """
  for value, choices, what in ((down, DOWNS, 'down'), (up, UPS, 'up')):
    if value not in choices:
      raise ValueError(f'sherl: {what}={value!r} is none of {", ".join(map(repr, choices))}')
  if reduction < 1 or width is not None and width < 1:
    raise ValueError(f'sherl: reduction={reduction} and width={width} must be at least 1')
  if not 0 <= dropout <= 1:
    raise ValueError(f'sherl: dropout={dropout!r} must lie in [0, 1]')

  @functools.lru_cache(maxsize=256)
  def stack(site: Site) -> tuple[Stack, tuple[int, ...]]:
    """(the stack, the states that are merged)."""
    net = Stack(site, blocks, exit)
    net.check_tokens(name)
    top = net.depth - net.is_last
    chosen = [i for i in net.chosen(layers) if i < top]
    if not chosen:
      raise ValueError(
        f'{name}: no block before the last of {net.depth} is left to merge before {site.path!r}'
      )
    return net, (0, *(i + 1 for i in chosen))

  def init(key, site, arrays):
    net, states = stack(site)
    d, n, keys = net.width, len(states), jax.random.split(key, 5)
    m = width or d // reduction
    gated = {
      '1': dense(keys[0], d, m, n, std=std),
      '2': dense(keys[1], m, m, n, std=std),
      '3': dense(keys[2], m, m, n, std=std),
    }
    t = {
      'down': gated if down == 'gated' else {'1': dense(keys[0], d, m, n), 'norm': scales(m, n)},
      'score': dense(keys[3], m, 1),
      'gamma': jnp.zeros(()),
      'up': dense(keys[4], m, d, std=std if up == 'linear' else None),
    }
    if up == 'norm':
      t['up_norm'] = scales(d)
    if not net.wraps_blocks:  # blocks that end with a norm need none after the last
      t['norm'] = scales(d) if _shifts(site) else {'scale': jnp.ones(d)}
    return t

  def project(h, t):
    if down == 'norm':
      return layer_norm(t['norm'], linear(t['1'], h))
    r = jax.nn.relu(linear(t['1'], h))
    return (linear(t['2'], r) + r) * jax.nn.sigmoid(linear(t['3'], r))

  def apply(t, call, x, *args, **kwargs):
    net, states = stack(call.site)
    y = call(x, *args, **kwargs)
    taps, deepest = call.taps(), net.depth - 1
    out = net.last(x, jax.tree.leaves(y)[0])
    u = net.each(jax.checkpoint(project) if remat else project, taps, out, states, t['down'])
    v = merged(t['score'], jnp.stack(u) if isinstance(u, list) else u)
    v = linear(t['up'], jax.nn.relu(v))
    v = layer_norm(t['up_norm'], v) if up == 'norm' else v
    v = drop(v, call.rng('sherl dropout') if dropout else None, dropout)
    held = net.recorded(taps, 'x', deepest) if net.is_last else out
    v = v + jnp.tanh(t['gamma'] / temperature) * held
    norm = layer_norm if _shifts(call.site) else rms_norm
    if not net.is_last:
      call.tap(side=v if net.wraps_blocks else norm(t['norm'], v))
      return y
    block, index = net.layer(deepest)
    inputs = {n: net.recorded(taps, n, deepest) for n in taps[block.path] if n != 'x'}
    if len(net.exits) > 1:
      inputs |= {
        n: taps[net.exits[0].path]['side']
        for n, role in _inputs(block).items()
        if role == 'context'
      }
    fn, arrays = call.layer(block, index)
    v = jax.tree.leaves(fn(arrays, v.astype(x.dtype), **inputs))[0]
    return put_first(y, v if net.wraps_blocks else norm(t['norm'], v))

  def also(site, inputs):
    """What the last block is called with beside the stream, but a context, which is the side
    network's.
    """
    return {n: a for n, a in list(inputs.items())[1:] if _inputs(site).get(n) != 'context'}

  return chain(
    record(name, blocks, also=also, memory=PARTIAL_REENTRY),
    at(exit, Call(name, apply, init, taps=True, memory=PARTIAL_REENTRY)),
  )


def merged(t, u: jax.Array) -> jax.Array:
  """v [B, N, m] of the projections u [n, B, N, m], the deepest last; t is the linear map of the
  scores.
  """
  shallow, deep = u[:-1].astype(jnp.float32), u[-1].astype(jnp.float32)
  square = jnp.sum(jnp.square(shallow), -1, keepdims=True)
  direction = shallow * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
  alike = jax.nn.relu(jnp.einsum('ibnm,jbnm->ijbn', direction, direction)).sum(1)
  score = jax.nn.relu(linear(t, u[:-1] * u[-1])[..., 0].astype(jnp.float32)) / jnp.maximum(
    alike, 1e-6
  )
  share = score / jnp.maximum(score.sum(0), 1e-6)
  return (jnp.einsum('ibn,ibnm->bnm', share, shallow) + deep).astype(u.dtype)


def _shifts(site: Site) -> bool:
  """Whether the norm at an exit has a shift: a LayerNorm, else an RMSNorm."""
  return 'bias' in site.leaves


def _inputs(site: Site) -> dict[str, str]:
  anatomy = site.model.anatomy
  return dict(anatomy.side) if anatomy else {}
