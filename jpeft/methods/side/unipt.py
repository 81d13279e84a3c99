"""UniPT: every state of the frozen backbone is projected and aligned to the last one, and a gate
weighs them.

Diao et al., 2024, "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter
and Memory" (arXiv 2308.14316; Paranioar/UniPT). With the states h_i [B, N, d], i = 0 the
embeddings, L the last, of width m:

  p_i = LN(W_i h_i),  Q = p_L,  A_i = L1(ReLU(Q p_i^T) M) + I  over keys,  t_i = A_i p_i              i < L
  c_i = w . (mean Q * mean p_i),  w_i = softmax over i,  out = Up(Q + Proj(sum_i w_i t_i))

M is the mask of the model: it multiplies scores, which is right since nothing is exponentiated. No
layer reads another, and no gradient enters the backbone.

  form        W_i                Q                          Proj                                Up
  tokens      linear, LN         state L                    linear, ReLU, linear, LN            linear
  retrieval   linear, LN         state L                    linear, LN                          ReLU, linear
  global      ReLU, linear       ReLU, linear of the        none                                ReLU, linear, added
                                 pooled embedding [B, e]                                        to the embedding

'tokens' is what the authors run for CLIP-ViL (Proj is as wide as the backbone inside), 'retrieval'
for the text tower of VSE infinity, `unipt_global` for CLIP4Clip, where state L is one of the
aligned ones and the layer's own class token is added in the place of I. The first two replace the
output of the exit, the third that of the module that makes the embedding.

In an encoder-decoder both stacks have such a network; as in the authors' MDETR, the p_i of the
decoder first take up the encoder's: p_i + LN(W_c L1(ReLU(p_i S^T)) S), S = Q + Proj(..) of the
encoder.

Deviations. In a decoder a token sees those before it alone, so that M is causal there and the means
are those over what a token sees. The applications on feature maps (convolutions, batch norm) are
left out. `downsample='pool'` is ours: means over groups of features in the place of W_i, so that
what is stored is narrow.
"""

import functools

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, factory

from ..masks import masks
from ..nn import dense, layer_norm, linear, pool, put_first, scales
from .stack import Stack, record

FORMS = ('tokens', 'retrieval')


@factory
def unipt(
  reduction: int = 2,
  form: str = 'tokens',
  width: int | None = None,
  out: int | None = None,
  downsample: str = 'linear',
  remat: bool = False,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'unipt',
) -> Method:
  """Universal parallel tuning (arXiv 2308.14316) of all tokens.

  Args:
    reduction: k; m is the width of the output divided by k.
    form: 'tokens' or 'retrieval', see above.
    width: m itself.
    out: width of the output; None for the backbone's, which what follows in the model needs.
    downsample: 'linear' (trained, keeps the states for its gradient) or 'pool' (means over groups
      of features).
    remat: recompute projections and alignments in the backward pass.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model without one stream of
      tokens.
  """
  for value, choices, what in (
    (form, FORMS, 'form'),
    (downsample, ('linear', 'pool'), 'downsample'),
  ):
    if value not in choices:
      raise ValueError(f'unipt: {what}={value!r} is none of {", ".join(map(repr, choices))}')
  _check(reduction=reduction, width=width, out=out)
  pooled = downsample == 'pool'
  narrow = lambda d: width or (out or d) // reduction
  keep = lambda x: pool(x, x.shape[-1] // narrow(x.shape[-1])) if pooled else x
  again = jax.checkpoint if remat else lambda fn: fn

  @functools.lru_cache(maxsize=256)
  def stack(site: Site) -> Stack:
    net = Stack(site, blocks, exit)
    net.check_tokens(name)
    if pooled and net.width % narrow(net.width):
      raise ValueError(
        f'{name}: m={narrow(net.width)} does not divide the width {net.width} of the blocks, whose '
        'features are pooled'
      )
    return net

  def init(key, site, arrays):
    net = stack(site)
    d, m, to, n = net.width, narrow(net.width), out or net.width, net.depth + 1
    inner = to if form == 'tokens' else m
    keys = jax.random.split(key, 6)
    t = {
      'layers': {'norm': scales(m, n), **({} if pooled else {'down': dense(keys[0], d, m, n)})},
      'gate': dense(keys[1], m, 1),
      'proj': {'in': dense(keys[2], m, inner), 'norm': scales(m)},
    }
    if form == 'tokens':
      t['proj']['out'] = dense(keys[3], inner, m)
    if net.is_last:
      t['up'] = dense(keys[4], m, to)
      if len(net.exits) > 1:
        t['cross'] = {'out': dense(keys[5], m, m), 'norm': scales(m)}
    return t

  def project(h, t):
    return layer_norm(t['norm'], linear(t['down'], h) if 'down' in t else h)

  def apply(t, call, x, *args, **kwargs):
    net = stack(call.site)
    y = call(x, *args, **kwargs)
    taps = call.taps()
    p = net.each(
      again(project),
      taps,
      keep(net.last(x, jax.tree.leaves(y)[0])),
      range(net.depth + 1),
      t['layers'],
    )
    anchor, early = p[-1], p[:-1]
    if 'cross' in t:
      source, seen = taps[net.exits[0].path]['side'], net.shared(taps, 'context_mask')
      met = again(
        lambda p: (
          p + layer_norm(t['cross']['norm'], linear(t['cross']['out'], align(p, source, seen)))
        )
      )
      anchor, early = (
        met(anchor),
        [met(p) for p in early] if isinstance(early, list) else jax.lax.map(met, early),
      )
    seen = visible(net, taps, anchor.shape[1])
    about = mean(anchor, seen)
    trust = lambda p: linear(t['gate'], about * mean(p, seen))
    total = _weighted(net, early, trust, lambda p: align(anchor, p, seen) + p, again, anchor)
    side = linear(t['proj']['in'], total)
    side = linear(t['proj']['out'], jax.nn.relu(side)) if form == 'tokens' else side
    side = anchor + layer_norm(t['proj']['norm'], side)
    if not net.is_last:
      call.tap(side=side)
      return y
    return put_first(y, linear(t['up'], side if form == 'tokens' else jax.nn.relu(side)))

  return chain(
    record(name, blocks, keep, lambda site, inputs: masks(inputs)),
    at(exit, Call(name, apply, init, taps=True, memory=NO_BACKPROP)),
  )


@factory
def unipt_global(
  reduction: int = 1,
  width: int | None = None,
  token: int = 0,
  remat: bool = False,
  blocks: str = '{block}',
  exit: str = '{exit}',
  embedding: str = '{head}',
  name: str = 'unipt_global',
) -> Method:
  """Universal parallel tuning (arXiv 2308.14316) of one pooled embedding.

  Args:
    reduction: k; m is the width of the embedding divided by k.
    width: m itself.
    token: which stands for a layer: 0 for a class token, -1 for the last.
    remat, blocks, exit, name: see `unipt`.
    embedding: pattern of the module whose output is the pooled embedding [B, e].

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model without one stream of
      tokens or without such an embedding.
  """
  _check(reduction=reduction, width=width)
  again = jax.checkpoint if remat else lambda fn: fn

  @functools.lru_cache(maxsize=64)
  def stack(site: Site) -> Stack:
    net = Stack(site, blocks, exit)
    net.check_tokens(name)
    return net

  def stack_of(site: Site) -> Stack:
    exits = [e for e in site.model.find(exit) if e.out is not None]
    if len(exits) != 1 or site.out is None or len(site.out.shape) != 2:
      raise ValueError(
        f'{name}: needs one stack of blocks and a pooled embedding [B, e]; {site.path!r} gives '
        f'{None if site.out is None else site.out.shape}, and there are {len(exits)} exits'
      )
    return stack(exits[0])

  def init(key, site, arrays):
    net, e = stack_of(site), site.out.shape[-1]
    m, keys = width or e // reduction, jax.random.split(key, 4)
    if not m:
      raise ValueError(
        f'{name}: reduction={reduction} leaves nothing of an embedding of {e}; give width='
      )
    return {
      'layers': dense(keys[0], net.width, m, net.depth + 1),
      'gate': dense(keys[1], m, 1),
      'anchor': dense(keys[2], e, m),
      'up': dense(keys[3], m, e),
    }

  def last(t, call, x, *args, **kwargs):
    y = call(x, *args, **kwargs)
    call.tap(last=stack(call.site).last(x, jax.tree.leaves(y)[0]))
    return y

  def apply(t, call, *args, **kwargs):
    net, taps = stack_of(call.site), call.taps()
    y = call(*args, **kwargs)
    e = jax.lax.stop_gradient(jax.tree.leaves(y)[0])
    anchor = linear(t['anchor'], jax.nn.relu(e))[:, None]
    project = again(lambda h, t: linear(t, jax.nn.relu(h)))
    early = net.each(project, taps, taps[net.site.path]['last'], range(net.depth + 1), t['layers'])
    seen = net.shared(taps, 'mask')
    seen = None if seen is None else seen.any(1, keepdims=True)
    trust = lambda p: linear(t['gate'], anchor * mean(p, seen))
    total = _weighted(
      net, early, trust, lambda p: align(anchor, p, seen) + p[:, token][:, None], again, anchor
    )
    return put_first(y, e + linear(t['up'], jax.nn.relu(anchor + total))[:, 0])

  return chain(
    record(name, blocks, also=lambda site, inputs: masks(inputs)),
    at(exit, Call(name, last, taps=True, memory=NO_BACKPROP)),
    at(embedding, Call(name, apply, init, taps=True, memory=NO_BACKPROP)),
  )


def _check(**sizes) -> None:
  for what, value in sizes.items():
    if value is not None and value < 1:
      raise ValueError(f'unipt: {what}={value} must be at least 1')


def _weighted(net: Stack, early, trust, aligned, again, like: jax.Array) -> jax.Array:
  """sum_i w_i aligned(p_i), w the softmax over layers of trust(p_i) [B, 1 or N, 1]."""
  scores = (
    jnp.stack([trust(p) for p in early]) if isinstance(early, list) else jax.vmap(trust)(early)
  )
  w = jax.nn.softmax(scores.astype(jnp.float32), 0).astype(like.dtype)
  step = again(lambda total, layer: total + layer['w'] * aligned(layer['p']))
  return net.run(step, jnp.zeros_like(like), {'p': early, 'w': w})


def visible(net: Stack, taps, length: int) -> jax.Array | None:
  """Which tokens [B or 1, 1 or N, N] a token sees, 1 or 0; None for all."""
  seen, anatomy = net.shared(taps, 'mask'), net.site.model.anatomy
  if anatomy is None or not anatomy.causal:
    return seen
  before = jnp.tril(jnp.ones((1, length, length), bool))
  return before if seen is None else seen & before


def align(q: jax.Array, p: jax.Array, seen: jax.Array | None = None) -> jax.Array:
  """ReLU-L1 attention: rows of ReLU(q p^T), times `seen`, over their sum, times p.

  Args:
    q: [B, N, m].
    p: keys and values [B, M, m].
    seen: [B or 1, 1 or N, M], 1 where a key is seen; None for all.
  """
  scores = jax.nn.relu(jnp.einsum('bnm,bkm->bnk', q, p))
  scores = scores if seen is None else scores * seen.astype(scores.dtype)
  total = jnp.maximum(jnp.sum(scores, -1, keepdims=True, dtype=jnp.float32), 1e-6)
  return (jnp.einsum('bnk,bkm->bnm', scores, p) / total).astype(q.dtype)


def mean(x: jax.Array, seen: jax.Array | None) -> jax.Array:
  """The mean of x [B, N, m] over the tokens that are seen: [B, 1 or N, m]."""
  if seen is None:
    return jnp.mean(x, 1, keepdims=True)
  seen = seen.astype(jnp.float32)
  share = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
  return jnp.einsum(
    'bqn,bnm->bqm', jnp.broadcast_to(share.astype(x.dtype), (len(x), *share.shape[1:])), x
  )
