"""UniPT: every state of the frozen backbone is projected and aligned to the last one, and a gate weighs them.

Diao et al., 2024, "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory"
(arXiv 2308.14316; Paranioar/UniPT). With the states h_i [B, N, d], i = 0 the embeddings, L the last, of width m:

  p_i = LN(W_i h_i),  Q = p_L,  A_i = L1(ReLU(Q p_i^T) M) + I  over keys,  t_i = A_i p_i              i < L
  c_i = w . (mean Q * mean p_i),  w_i = softmax over i,  out = Up(Q + Proj(sum_i w_i t_i))

M is the mask of the model: it multiplies scores, which is right since nothing is exponentiated. No layer
reads another, and no gradient enters the backbone.

  form        W_i                Q                          Proj                                Up
  tokens      linear, LN         state L                    linear, ReLU, linear, LN            linear
  retrieval   linear, LN         state L                    linear, LN                          ReLU, linear
  global      ReLU, linear       ReLU, linear of the        none                                ReLU, linear, added
                                 pooled embedding [B, e]                                        to the embedding

'tokens' is what the authors run for CLIP-ViL (Proj is as wide as the backbone inside), 'retrieval' for the text
tower of VSE infinity, 'global' for CLIP4Clip, where state L is one of the aligned ones and instead of I the layer's
own class token is added. 'tokens' and 'retrieval' replace the output of the exit, 'global' that of the module
that makes the embedding.

In an encoder-decoder both stacks have such a network; as in the authors' MDETR, the p_i of the decoder first take
up the encoder's: p_i + LN(W_c L1(ReLU(p_i S^T)) S), S = Q + Proj(..) of the encoder.

Deviations. In a decoder a token sees those before it alone, so that M is causal there and the means are those
over what a token sees. The applications on feature maps (convolutions, batch norm) are left out. `downsample='pool'`
is ours: means over groups of features in the place of W_i, so that what is stored is narrow.
"""

import functools

import jax
import jax.numpy as jnp

from ..core import Call, Method, Site, at, chain
from .stack import Stack, dense, layer_norm, linear, masks, pool, put_first, record, scales
from .tune import NONE

FORMS = ('tokens', 'retrieval', 'global')


def unipt(reduction: int = 2, form: str = 'tokens', width: int | None = None, out: int | None = None,
          downsample: str = 'linear', token: int = 0, remat: bool = False, blocks: str = '{block}',
          exit: str = '{exit}', embedding: str = '{head}', name: str = 'unipt') -> Method:
  """Universal parallel tuning (arXiv 2308.14316).

  Args:
    reduction: k; m is the width of the output divided by k.
    form: 'tokens', 'retrieval' or 'global', see above.
    width: m itself.
    out: width of the output of 'retrieval' and 'tokens'; None for the backbone's, which what follows needs.
    downsample: 'linear' (trained, keeps the states for its gradient) or 'pool' (means over groups of features;
      'tokens' and 'retrieval' alone).
    token: of 'global', the token that stands for a layer: 0 for a class token, -1 for the last.
    remat: recompute projections and alignments in the backward pass.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    embedding: of 'global', pattern of the module whose output is the pooled embedding [B, e].
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model without one stream of tokens.
  """
  for value, choices, what in ((form, FORMS, 'form'), (downsample, ('linear', 'pool'), 'downsample')):
    if value not in choices:
      raise ValueError(f'unipt: {what}={value!r} is none of {", ".join(map(repr, choices))}')
  for value, what in ((reduction, 'reduction'), (width, 'width'), (out, 'out')):
    if value is not None and value < 1:
      raise ValueError(f'unipt: {what}={value} must be at least 1')
  pooled, whole = downsample == 'pool', form == 'global'
  if pooled and whole:
    raise ValueError("unipt: form='global' has no norm that a pooled state could go through: downsample='linear'")

  @functools.lru_cache(maxsize=256)
  def stack(site: Site) -> Stack:
    net = Stack(site, blocks, exit)
    net.check_tokens(name)
    return net

  def sizes(net: Stack, target: int) -> tuple[int, int, int]:
    """(d, m, width of the output)."""
    to = out or target
    m = width or to // reduction
    if pooled and net.width % m:
      raise ValueError(f'{name}: m={m} does not divide the width {net.width} of the blocks, whose features are pooled')
    return net.width, m, to

  def keep(x):
    return pool(x, x.shape[-1] // (width or (out or x.shape[-1]) // reduction)) if pooled else x

  def project(h, t):
    return linear(t['down'], jax.nn.relu(h)) if whole else layer_norm(t['norm'], linear(t['down'], h) if 'down' in t
                                                                      else h)

  def init(key, site, arrays):
    net = stack(site)
    d, m, to = sizes(net, net.width)
    keys = jax.random.split(key, 6)
    n = net.depth + 1
    t = {'layers': {'norm': scales(m, n), **({} if pooled else {'down': dense(keys[0], d, m, n)})},
         'gate': dense(keys[1], m, 1)}
    inner = to if form == 'tokens' else m
    t['proj'] = {'in': dense(keys[2], m, inner), 'norm': scales(m)}
    if form == 'tokens':
      t['proj']['out'] = dense(keys[3], inner, m)
    if net.is_last:
      t['up'] = dense(keys[4], m, to)
      if len(net.exits) > 1:
        t['cross'] = {'out': dense(keys[5], m, m), 'norm': scales(m)}
    return t

  def parallel(t, call, x, *args, **kwargs):
    net = stack(call.site)
    y = call(x, *args, **kwargs)
    taps = call.taps()
    p = net.each(again(project), taps, keep(net.last(x, jax.tree.leaves(y)[0])), range(net.depth + 1), t['layers'])
    anchor, early = p[-1], p[:-1]
    if 'cross' in t:
      source = taps[net.exits[0].path]['side']
      seen = _recorded(net, taps, 'context_mask')
      met = again(lambda p: p + layer_norm(t['cross']['norm'], linear(t['cross']['out'], align(p, source, seen))))
      anchor, early = met(anchor), [met(p) for p in early] if isinstance(early, list) else jax.lax.map(met, early)
    seen = visible(net, taps, anchor)
    total = weighted(t, net, anchor, early, seen, lambda a, p: align(a, p, seen) + p)
    side = linear(t['proj']['in'], total.astype(anchor.dtype))
    side = linear(t['proj']['out'], jax.nn.relu(side)) if form == 'tokens' else side
    side = anchor + layer_norm(t['proj']['norm'], side)
    if not net.is_last:
      call.tap(side=side)
      return y
    return put_first(y, linear(t['up'], side if form == 'tokens' else jax.nn.relu(side)))

  def weighted(t, net, anchor, early, seen, aligned):
    """sum_i w_i t_i."""
    about = mean(anchor, seen) if anchor.shape[1] > 1 else anchor
    trust = lambda p: linear(t['gate'], about * mean(p, seen)).astype(jnp.float32)
    trust = jnp.stack([trust(p) for p in early]) if isinstance(early, list) else jax.vmap(trust)(early)
    step = again(lambda total, layer: total + layer['w'].astype(anchor.dtype) * aligned(anchor, layer['p']))
    return net.run(step, jnp.zeros_like(anchor), {'p': early, 'w': jax.nn.softmax(trust, 0)})

  def visible(net, taps, like):
    """Which tokens [B or 1, 1 or N, N] a token sees, 1 or 0; None for all."""
    seen = _recorded(net, taps, 'mask')
    anatomy = net.site.model.anatomy
    if anatomy is not None and anatomy.causal:
      before = jnp.tril(jnp.ones((1, like.shape[1], like.shape[1]), bool))
      seen = before if seen is None else seen & before
    return seen

  def again(fn):
    return jax.checkpoint(fn) if remat else fn

  if not whole:
    return chain(record(name, blocks, keep, lambda site, inputs: masks(inputs)),
                 at(exit, Call(name, parallel, init, taps=True, memory=NONE)))

  @functools.lru_cache(maxsize=64)
  def stack_of(site: Site) -> Stack:
    exits = [e for e in site.model.find(exit) if e.out is not None]
    if len(exits) != 1 or site.out is None or len(site.out.shape) != 2:
      raise ValueError(f"{name}: form='global' needs one stack and a pooled embedding [B, e]; {site.path!r} gives "
                       f'{None if site.out is None else site.out.shape}, and there are {len(exits)} exits')
    return stack(exits[0])

  def init_global(key, site, arrays):
    net = stack_of(site)
    d, m, e = sizes(net, site.out.shape[-1])
    keys = jax.random.split(key, 4)
    return {'layers': {'down': dense(keys[0], d, m, net.depth + 1)}, 'gate': dense(keys[1], m, 1),
            'anchor': dense(keys[2], e, m), 'up': dense(keys[3], m, e)}

  def last(t, call, x, *args, **kwargs):
    y = call(x, *args, **kwargs)
    call.tap(last=stack(call.site).last(x, jax.tree.leaves(y)[0]))
    return y

  def overall(t, call, *args, **kwargs):
    net, taps = stack_of(call.site), call.taps()
    e = jax.lax.stop_gradient(call(*args, **kwargs))
    anchor = linear(t['anchor'], jax.nn.relu(e))[:, None]
    early = net.each(again(project), taps, taps[net.site.path]['last'], range(net.depth + 1), t['layers'])
    seen = _recorded(net, taps, 'mask')
    seen = None if seen is None else seen.any(1, keepdims=True)
    one = lambda p: p[:, token][:, None]
    total = weighted(t, net, anchor, early, seen, lambda a, p: align(a, p, seen) + one(p))
    return e + linear(t['up'], jax.nn.relu(anchor + total))[:, 0]

  return chain(record(name, blocks, also=lambda site, inputs: masks(inputs)),
               at(exit, Call(name, last, taps=True, memory=NONE)),
               at(embedding, Call(name, overall, init_global, taps=True, memory=NONE)))


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
  return jnp.einsum('bqn,bnm->bqm', jnp.broadcast_to(share.astype(x.dtype), (len(x), *share.shape[1:])), x)


def _recorded(net: Stack, taps, what: str) -> jax.Array | None:
  return net.recorded(taps, what, 0) if what in taps[net.stack[0].path] else None
