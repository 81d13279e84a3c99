"""UniPT: all states of the frozen backbone are projected, aligned to the last one, and weighed.

Diao et al., 2024, "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter
and Memory" (arXiv 2308.14316; Paranioar/UniPT). The letters:

  h_i [B, N, d]  state i of the backbone: i = 0 the embeddings, L the last
  p_i [B, N, m]  its projection, by W_i
  Q   [B, N, m]  the anchor that the others are aligned to
  M   [B, N, N]  the mask of the model, 1 where a token sees another

With I the identity and L1 dividing by the sum over keys, for i < L

  p_i = LN(W_i h_i),  Q = p_L,  A_i = L1(ReLU(Q p_i^T) M) + I,  t_i = A_i p_i
  c_i = w . (mean Q * mean p_i),  w_i = softmax of c_i over i,  out = Up(Q + Proj(sum_i w_i t_i))

M multiplies scores, which is right since nothing is exponentiated. No layer reads another, and no
gradient enters the backbone.

  form        W_i            Q                    Proj                       Up
  tokens      linear, LN     state L              linear, ReLU, linear, LN   linear
  retrieval   linear, LN     state L              linear, LN                 ReLU, linear
  global      ReLU, linear   ReLU, linear of      none                       ReLU, linear, added
                             the embedding                                   to the embedding

'tokens' is what the authors run for CLIP-ViL (Proj is as wide as the backbone inside), 'retrieval'
for the text tower of VSE infinity, `unipt_global` for CLIP4Clip, where state L is one of the
aligned ones, Q is made of the pooled embedding [B, e], and the layer's own class token is added in
the place of I. The first two replace the output of the exit, the third that of the module that
makes the embedding.

In an encoder-decoder both stacks have such a network; as in the authors' MDETR, the p_i of the
decoder first take up the encoder's: p_i + LN(W_c L1(ReLU(p_i S^T)) S), S = Q + Proj(..) of the
encoder.

Deviations. In a decoder a token sees those before it alone, so that M is causal there and the means
are those over what a token sees. The applications on feature maps (convolutions, batch norm) are
left out. `downsample='pool'` is ours: means over groups of features in the place of W_i, so that
what is stored is narrow.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, Site, at, chain, factory

from ..masks import masks
from ..nn import dense, layer_norm, linear, pool, put_stream, remat_if, scales
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
  return _UniPT(reduction, form, width, out, downsample, remat, blocks, exit, name).method()


@dataclasses.dataclass(frozen=True)
class _UniPT:
  """The rules of `unipt`; the fields are its arguments."""

  reduction: int
  form: str
  width: int | None
  out: int | None
  downsample: str
  remat: bool
  blocks: str
  exit: str
  name: str

  def method(self) -> Method:
    """Records the states, and replaces the output of each exit."""
    side = Call(self.name, self.apply, self.init, taps=True, memory=NO_BACKPROP)
    return chain(
      record(self.name, self.blocks, self.keep, _masks),
      at(self.exit, side),
    )

  @property
  def pooled(self) -> bool:
    """Whether groups of features are averaged in the place of W_i."""
    return self.downsample == 'pool'

  def narrow(self, width: int) -> int:
    """m, beside a backbone of some width."""
    if self.width is not None:
      return self.width
    if self.out is not None:
      return self.out // self.reduction
    return width // self.reduction

  def keep(self, state: jax.Array) -> jax.Array:
    """What is recorded of h_i: the whole state, or its pooled features."""
    if not self.pooled:
      return state
    width = state.shape[-1]
    return pool(state, width // self.narrow(width))

  def stack(self, site: Site) -> Stack:
    """The blocks before an exit."""
    net = Stack(site, self.blocks, self.exit)
    net.check_tokens(self.name)
    narrow = self.narrow(net.width)
    if self.pooled and net.width % narrow:
      raise ValueError(
        f'{self.name}: m={narrow} does not divide the width {net.width} of the blocks, whose '
        'features are pooled'
      )
    return net

  def init(self, key, site: Site, arrays) -> dict:
    """W_i and LN as 'layers', w as 'gate', 'proj'; at the last exit 'up', in a decoder 'cross'."""
    net = self.stack(site)
    states = net.depth + 1
    narrow = self.narrow(net.width)
    out = self.out or net.width
    inner = narrow
    if self.form == 'tokens':
      inner = out
    keys = jax.random.split(key, 6)
    t = {
      'layers': {'norm': scales(narrow, states)},
      'gate': dense(keys[1], narrow, 1),
      'proj': {'in': dense(keys[2], narrow, inner), 'norm': scales(narrow)},
    }
    if not self.pooled:
      t['layers']['down'] = dense(keys[0], net.width, narrow, states)
    if self.form == 'tokens':
      t['proj']['out'] = dense(keys[3], inner, narrow)
    if net.is_last:
      t['up'] = dense(keys[4], narrow, out)
    if net.encoder is not None:
      t['cross'] = {'out': dense(keys[5], narrow, narrow), 'norm': scales(narrow)}
    return t

  def apply(self, t, call, x, *args, **kwargs):
    """The output of the exit, made of all states before it; an encoder's stays the backbone's."""
    net = self.stack(call.site)
    y = call(x, *args, **kwargs)
    taps = call.taps()
    last = self.keep(net.last(x, call.site.stream(y)))
    states = range(net.depth + 1)
    p = net.each(remat_if(self.remat, project), taps, last, states, t['layers'])
    if 'cross' in t:
      p = self.read_encoder(t['cross'], net, taps, p)
    anchor = p[-1]  # Q [B, N, m]
    seen = visible(net, taps, anchor.shape[1])
    mean_of_anchor = mean(anchor, seen)

    def score(p):  # c_i [B, 1 or N, 1]
      return linear(t['gate'], mean_of_anchor * mean(p, seen))

    def aligned(p):  # t_i [B, N, m]
      return align(anchor, p, seen) + p

    total = weighted_sum(net, p[:-1], score, aligned, anchor, self.remat)
    side = anchor + self.project_total(t['proj'], total)
    if not net.is_last:
      call.tap(side=side)
      return y
    if self.form == 'retrieval':
      side = jax.nn.relu(side)
    return put_stream(call.site, y, linear(t['up'], side))

  def project_total(self, t, total: jax.Array) -> jax.Array:
    """Proj: [B, N, m] to [B, N, m]."""
    y = linear(t['in'], total)
    if self.form == 'tokens':
      y = linear(t['out'], jax.nn.relu(y))
    return layer_norm(t['norm'], y)

  def read_encoder(self, t, net: Stack, taps, p):
    """The p_i of a decoder, each plus what it takes up of the encoder's S."""
    source = taps[net.encoder.path]['side']
    seen = net.shared(taps, 'context_mask')

    def read(p):
      return p + layer_norm(t['norm'], linear(t['out'], align(p, source, seen)))

    read = remat_if(self.remat, read)
    if isinstance(p, list):
      return [read(layer) for layer in p]
    # One layer at a time: together they would take the scores [B, N, M] of all of them.
    early = jax.lax.map(read, p[:-1])
    return jnp.concatenate([early, read(p[-1])[None]])


def project(state: jax.Array, t) -> jax.Array:
  """p_i [B, N, m] of a state h_i [B, N, d], or of one that is pooled already."""
  if 'down' in t:
    state = linear(t['down'], state)
  return layer_norm(t['norm'], state)


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
  return _GlobalUniPT(reduction, width, token, remat, blocks, exit, embedding, name).method()


@dataclasses.dataclass(frozen=True)
class _GlobalUniPT:
  """The rules of `unipt_global`; the fields are its arguments."""

  reduction: int
  width: int | None
  token: int
  remat: bool
  blocks: str
  exit: str
  embedding: str
  name: str

  def method(self) -> Method:
    """Records the states and the last one, and replaces the embedding."""
    last = Call(self.name, self.record_last, taps=True, memory=NO_BACKPROP)
    side = Call(self.name, self.apply, self.init, taps=True, memory=NO_BACKPROP)
    return chain(
      record(self.name, self.blocks, also=_masks),
      at(self.exit, last),
      at(self.embedding, side),
    )

  def stack(self, site: Site) -> Stack:
    """The blocks before an exit."""
    net = Stack(site, self.blocks, self.exit)
    net.check_tokens(self.name)
    return net

  def stack_of(self, site: Site) -> Stack:
    """The blocks whose states an embedding is made of, the only ones of the model."""
    exits = [found for found in site.model.find(self.exit) if found.out is not None]
    shape = None
    if site.out is not None:
      shape = site.out.shape
    if len(exits) != 1 or shape is None or len(shape) != 2:
      raise ValueError(
        f'{self.name}: needs one stack of blocks and a pooled embedding [B, e]; {site.path!r} '
        f'gives {shape}, and there are {len(exits)} exits'
      )
    return self.stack(exits[0])

  def init(self, key, site: Site, arrays) -> dict:
    """W_i as 'layers', w as 'gate', the map of the embedding to Q as 'anchor', 'up'."""
    net = self.stack_of(site)
    embedding = site.out.shape[-1]
    narrow = self.width or embedding // self.reduction
    if not narrow:
      raise ValueError(
        f'{self.name}: reduction={self.reduction} leaves nothing of an embedding of {embedding}; '
        'give width='
      )
    keys = jax.random.split(key, 4)
    return {
      'layers': dense(keys[0], net.width, narrow, net.depth + 1),
      'gate': dense(keys[1], narrow, 1),
      'anchor': dense(keys[2], embedding, narrow),
      'up': dense(keys[3], narrow, embedding),
    }

  def record_last(self, t, call, x, *args, **kwargs):
    """Runs the exit, and records the last state."""
    y = call(x, *args, **kwargs)
    call.tap(last=self.stack(call.site).last(x, call.site.stream(y)))
    return y

  def apply(self, t, call, *args, **kwargs):
    """The embedding [B, e], plus what all states add to it."""
    net = self.stack_of(call.site)
    taps = call.taps()
    y = call(*args, **kwargs)
    embedding = jax.lax.stop_gradient(call.site.stream(y))
    anchor = linear(t['anchor'], jax.nn.relu(embedding))[:, None]  # Q [B, 1, m]
    last = taps[net.site.path]['last']
    states = range(net.depth + 1)
    p = net.each(remat_if(self.remat, project_relu), taps, last, states, t['layers'])
    seen = net.shared(taps, 'mask')
    if seen is not None:
      seen = seen.any(1, keepdims=True)  # [B or 1, 1, N]: the embedding sees what any token sees

    def score(p):  # c_i [B, 1, 1]
      return linear(t['gate'], anchor * mean(p, seen))

    def aligned(p):  # t_i [B, 1, m]
      return align(anchor, p, seen) + p[:, self.token][:, None]

    total = weighted_sum(net, p, score, aligned, anchor, self.remat)
    update = linear(t['up'], jax.nn.relu(anchor + total))[:, 0]
    return put_stream(call.site, y, embedding + update)


def project_relu(state: jax.Array, t) -> jax.Array:
  """p_i [B, N, m] of a state h_i [B, N, d], for a pooled embedding."""
  return linear(t, jax.nn.relu(state))


def _check(**sizes) -> None:
  for what, value in sizes.items():
    if value is not None and value < 1:
      raise ValueError(f'unipt: {what}={value} must be at least 1')


def _masks(site: Site, inputs) -> dict[str, jax.Array]:
  return masks(inputs)


def weighted_sum(net: Stack, p, score, aligned, like: jax.Array, remat: bool) -> jax.Array:
  """sum_i w_i t_i, w the softmax of c_i over the layers.

  Args:
    net: the blocks.
    p: p_i, as `Stack.each` gives them: a list, or stacked.
    score: p_i -> c_i [B, 1 or N, 1].
    aligned: p_i -> t_i.
    like: an array of the shape and dtype of the sum.
    remat: recompute the alignments in the backward pass.
  """
  if isinstance(p, list):
    scores = jnp.stack([score(layer) for layer in p])
  else:
    scores = jax.vmap(score)(p)
  weights = jax.nn.softmax(scores.astype(jnp.float32), 0).astype(like.dtype)

  def add(total, layer):
    return total + layer['w'] * aligned(layer['p'])

  return net.run(remat_if(remat, add), jnp.zeros_like(like), {'p': p, 'w': weights})


def visible(net: Stack, taps, length: int) -> jax.Array | None:
  """Which tokens [B or 1, 1 or N, N] a token sees, 1 or 0; None for all."""
  seen = net.shared(taps, 'mask')
  if not net.site.model.causal:
    return seen
  before = jnp.tril(jnp.ones((1, length, length), bool))
  if seen is None:
    return before
  return seen & before


def align(q: jax.Array, p: jax.Array, seen: jax.Array | None = None) -> jax.Array:
  """ReLU-L1 attention: rows of ReLU(q p^T), times `seen`, over their sum, times p.

  Args:
    q: [B, N, m].
    p: keys and values [B, M, m].
    seen: [B or 1, 1 or N, M], 1 where a key is seen; None for all.
  """
  scores = jax.nn.relu(jnp.einsum('bnm,bkm->bnk', q, p))
  if seen is not None:
    scores = scores * seen.astype(scores.dtype)
  total = jnp.sum(scores, -1, keepdims=True, dtype=jnp.float32)
  # Where no score is positive, the row is zero and not 0 / 0.
  total = jnp.maximum(total, 1e-6)
  return (jnp.einsum('bnk,bkm->bnm', scores, p) / total).astype(q.dtype)


def mean(x: jax.Array, seen: jax.Array | None) -> jax.Array:
  """The mean of x [B, N, m] over the tokens that are seen: [B, 1 or N, m]."""
  if seen is None:
    return jnp.mean(x, 1, keepdims=True)
  seen = seen.astype(jnp.float32)
  share = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)  # [B or 1, 1 or N, N]
  share = jnp.broadcast_to(share.astype(x.dtype), (len(x), *share.shape[1:]))
  return jnp.einsum('bqn,bnm->bqm', share, x)
