"""Visual query tuning: learned queries that summarise what each frozen block attends to.

Tu et al., 2023 (arXiv 2212.03220; andytu28/VQT). Block i gets T tokens q_i that are queries alone:
with k, v the block's own keys and values of its input x,

  z = q_i + Wo attention(Wq LN1(q_i), k, v),  z <- z + MLP(LN2(z)),  Z_i = z [B, T, d],

and the tokens of the model never see them. A new linear head reads the final feature and all
summaries:

  logits = W [n(h); n(vec Z_1); ..; n(vec Z_L)] + b,  n: to length 1.

The block runs a second time on the T tokens, its attention reading the keys and values that it made
in the first run, so that no gradient of the width of N tokens exists: the backward pass keeps k and
v, or, with `remat`, x. The official code runs one sequence [q; x] and keeps everything. Both give
the same numbers.

q ~ U(-a, a), a as for prompts; W ~ N(0, 2 / C), b = -log 99, a prior of one hundredth.
`group_lasso` and `select` are the paper's compression; dropout falls on q.

Deviations. Dropout of the backbone is what the model's own flag says; the authors run it in eval
mode. Masks of the model let a summary see what any token sees. The ablations (pooled summaries) are
left out.
"""

import math

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, at, chain, factory

from ..nn import drop
from ..prompt.prefix import ARGUMENTS
from ..prompt.vpt import on_stream, spread_of
from . import features


@factory
def vqt(
  tokens: int = 1,
  dropout: float = 0.1,
  norm: bool = True,
  remat: bool = False,
  blocks: str = '{block}',
  attention: str = '{attention}',
  head: str = '{head}',
  name: str = 'vqt',
) -> Method:
  """Visual query tuning (arXiv 2212.03220); trains the head too.

  Args:
    tokens: T.
    dropout: rate on the entries of the queries.
    norm: whether the feature and each block's summaries are brought to length 1.
    remat: keep the input of each block and make keys and values again in the backward pass.
    blocks: pattern of the blocks.
    attention: pattern of the modules in them that call their own `attention_fn`.
    head: pattern of the module that maps the feature [B, d] to logits [B, C].
    name: in theta: of a block {'queries': [T, d], 'kernel': [T d, C], 'keep'}, of the head
      {'kernel', 'bias', 'keep'}.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, attention that is computed inline,
      or a model that does not give one prediction an example.
  """
  if int(tokens) != tokens or tokens < 1:
    raise ValueError(f'tokens={tokens!r} must be a whole number, at least 1')
  if not 0 <= dropout <= 1:
    raise ValueError(f'dropout={dropout!r} must lie in [0, 1]')
  std = lambda classes: math.sqrt(2 / classes)

  def init(key, site, arrays):
    width, classes = site.input.shape[-1], features.head_of(site, head, name).out.shape[-1]
    if not [s for s in site.model.find(attention) if s.path.startswith(f'{site.path}/')]:
      raise ValueError(
        f'{name}: no module of the block {site.path!r} is its attention {attention!r}'
      )
    a, (one, two) = spread_of(site, width), jax.random.split(key)
    return {
      'queries': jax.random.uniform(one, (tokens, width), minval=-a, maxval=a),
      **features.begin(two, tokens * width, classes, std(classes)),
    }

  def summarise(t, call, *args, **kwargs):
    fn, arrays = call.pure()
    run = lambda stream: fn(arrays, *stream[0], **stream[1])
    out = call(*args, **kwargs)
    batch = jax.tree.leaves(out)[0].shape[0]
    q = drop(t['queries'], call.rng('query dropout') if dropout else None, dropout)

    def summary(q):
      if remat:
        run((args, kwargs))
      call.local['summary'] = True
      try:
        return jax.tree.leaves(
          run(on_stream(call, args, kwargs, lambda x: jnp.broadcast_to(q, (batch, *q.shape))))
        )[0]
      finally:
        call.local['summary'] = False

    z = (jax.checkpoint(summary) if remat else summary)(
      q.astype(jax.tree.leaves(out)[0].dtype)
    ).reshape(batch, -1)
    call.tap(vote=features.vote(t, features.unit(z) if norm else z))
    return out

  def check(key, site, arrays):
    if site.heads is None:
      raise ValueError(
        f'{name}: {site.kind} at {site.path!r} calls no attention_fn of its own that could take other '
        'queries; give its class that field'
      )
    return {}

  def attend(t, call, *args, **kwargs):
    block, path, base = call.outer, call.site.path, call.module.attention_fn

    def attention_fn(query, key, value, *rest, **named):
      if not block.get('summary'):
        block[path] = jax.lax.stop_gradient((key, value))
        return base(query, key, value, *rest, **named)
      named |= dict(zip(ARGUMENTS, rest, strict=False))
      named.pop('is_causal', None)
      if named.get('bias') is not None and named['bias'].shape[-2] != 1:
        raise ValueError(
          f'{name}: the bias of {path!r} goes by the position of a query, and a summary has none'
        )
      if named.get('mask') is not None:
        named['mask'] = named['mask'].any(-2, keepdims=True)
      return base(query, *block[path], **named)

    with call.inject(attention_fn=attention_fn):
      return call(*args, **kwargs)

  return chain(
    at(attention, Call(name, attend, check, memory=NO_BACKPROP)),
    at(blocks, Call(name, summarise, init, fixed=features.FIXED, taps=True, memory=NO_BACKPROP)),
    features.head_method(name, head, std, -math.log(99), norm),
  )
