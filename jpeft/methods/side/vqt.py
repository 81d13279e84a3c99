"""Visual query tuning: learned queries that summarise what each frozen block attends to.

Tu et al., 2023, "Visual Query Tuning: Towards Effective Usage of Intermediate Representations for
Parameter and Memory Efficient Transfer Learning" (arXiv 2212.03220; andytu28/VQT). The letters:

  q_i [T, d]     trained tokens of block i, which are queries alone
  k, v           the block's own keys and values, of its input x [B, N, d]
  Z_i [B, T, d]  the summaries: what the block makes of q_i
  h   [B, d]     the final feature, the input of the model's head

With the block's own frozen weights, z starting as q_i,

  z <- z + Wo attention(Wq LN1(z), k, v),  z <- z + MLP(LN2(z)),  Z_i = z,

and the tokens of the model never see those of the method. A new linear head reads the final feature
and all summaries, n bringing each to length 1:

  logits = W [n(h); n(vec Z_1); ..; n(vec Z_L)] + b

The block runs a second time on the T tokens, its attention reading the keys and values that it made
in the first run, so that no gradient of the width of N tokens exists. What that attention returns
changes with the queries alone, each head's output o [e] with that head's query [e], so the backward
pass needs of N keys and values only their slopes do / dq [B, T, heads, e, e]. It keeps those where
they are smaller than k and v (2 N > T e), and makes the rest of the run on T tokens
again; else it keeps k and v, or, with `remat`, x. The official code runs
one sequence [q; x] and keeps everything. All give the same numbers.

q ~ U(-a, a), a as for prompts; W ~ N(0, 2 / C), b = -log 99, a prior of one hundredth.
`lasso` and `select` are the paper's compression; dropout falls on q.

Deviations. Dropout of the backbone is what the model's own flag says; the authors run it in eval
mode. Masks of the model let a summary see what any token sees. The ablations (pooled summaries) are
left out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpeft.core import NO_BACKPROP, Call, Method, at, chain, factory

from ..arguments import on_first
from ..check import at_least, choice, whole, within
from ..keys import named_options
from ..masks import has_length, is_of_other_sequence, mask_names
from ..nn import drop, remat_if, uniform
from ..prompt.vpt import spread_of
from ..tokens import check_no_windows
from . import features

SLOPES = 'slopes'
KEPT = ('keys', SLOPES)
_BIAS = -math.log(99)


class Seen(NamedTuple):
  """What an attention made of the tokens of the model, of which its summaries are made.

  Attributes:
    key, value: [.., N, heads, e].
    slopes: whether the backward pass keeps slopes instead.
  """

  key: jax.Array
  value: jax.Array
  slopes: bool


@factory
def vqt(
  tokens: int = 1,
  dropout: float = 0.1,
  norm: bool = True,
  remat: bool = False,
  keep: str | None = None,
  blocks: str = '{block}',
  attention: str = '{attention}',
  head: str = '{head}',
  lasso: float = 0.0,
  name: str = 'vqt',
) -> Method:
  """Visual query tuning (arXiv 2212.03220); trains the head too.

  Args:
    tokens: T.
    dropout: rate on the entries of the queries.
    norm: whether the feature and each block's summaries are brought to length 1.
    remat: keep the input of each block and make keys and values again in the backward pass.
    keep: what the backward pass keeps of a block's attention, 'keys' (and values) or 'slopes', for
      which the attention function must treat each head by itself; None for the smaller of the two,
      or for nothing with `remat`.
    blocks: pattern of the blocks.
    attention: pattern of the modules in them that call their own `attention_fn`, or compute
      attention inline and have an anatomy that knows how (`Anatomy.attention`).
    head: pattern of the module that maps the feature [B, d] to logits [B, C].
    lasso: factor of the group lasso of the head's weights, which training adds to the loss.
    name: in theta: of a block {'queries': [T, d], 'kernel': [T d, C], 'keep': [T d]}, of the head
      {'kernel': [d, C], 'bias': [C], 'keep': [d]}.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, attention that is out of reach,
      or a model that does not give one prediction an example.
  """
  return _VQT(tokens, dropout, norm, remat, keep, blocks, attention, head, lasso, name).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _VQT:
  """The hyperparameters of `vqt`, and its rules as methods.

  A block's rule and that of the attention in it share the block's `local`, where the attention
  finds 'summary', whether the block runs on q_i, and stores what it has `Seen` by its own path.
  """

  tokens: int
  dropout: float
  norm: bool
  remat: bool
  keep: str | None
  blocks: str
  attention: str
  head: str
  lasso: float
  name: str

  def __post_init__(self):
    whole('vqt', 'tokens', self.tokens, 1)
    within('vqt', 'dropout', self.dropout, 0, 1)
    at_least('vqt', 'lasso', self.lasso, 0)
    choice('vqt', 'keep', self.keep, (None, *KEPT))
    if self.remat and self.keep is not None:
      raise ValueError(
        f'vqt: keep={self.keep!r} is kept for the backward pass, and remat keeps the input of a '
        'block instead: leave one of them out'
      )

  def method(self) -> Method:
    """Attention that stores and reads keys and values, blocks that run twice, and the new head."""
    attention = Call(self.name, self.apply_attention, requires='attention', memory=NO_BACKPROP)
    block = Call(
      self.name,
      self.apply_block,
      self.init_block,
      fixed=features.FIXED,
      taps=True,
      memory=NO_BACKPROP,
    )
    return chain(
      at(self.attention, attention),
      at(self.blocks, block),
      features.head_method(self.name, self.head, _std, _BIAS, self.norm, self.lasso),
    )

  # A block, which runs a second time on its queries.

  def init_block(self, key, site, arrays):
    width = site.input.shape[-1]
    classes = features.head_of(site, self.head, self.name).out.shape[-1]
    inside = f'{site.path}/'
    if not any(found.path.startswith(inside) for found in site.model.find(self.attention)):
      raise ValueError(
        f'{self.name}: no module of the block {site.path!r} is its attention {self.attention!r}'
      )
    check_no_windows(site, site.input)
    key_queries, key_kernel = jax.random.split(key)
    return {
      'queries': uniform(key_queries, (self.tokens, width), spread_of(site, width)),
      **features.begin(key_kernel, self.tokens * width, classes, _std(classes)),
    }

  def apply_block(self, t, call, *args, **kwargs):
    """Runs a block, and records what its summaries add to the logits, as the tap `vote`."""
    block, arrays = call.pure()
    self.check_arguments(call, args, kwargs)
    out = call(*args, **kwargs)
    first = call.site.stream(out)
    batch = len(first)

    def summarise(queries):  # [T, d] to Z [B, T, d]
      if self.remat:
        # Makes keys and values inside of what is recomputed, so that the forward pass keeps none.
        block(arrays, *args, **kwargs)
      stream = jnp.broadcast_to(queries, (batch, *queries.shape))
      own_args, own_kwargs = on_first(call, args, kwargs, lambda x: stream)
      call.local['summary'] = True
      try:
        return call.site.stream(block(arrays, *own_args, **own_kwargs))
      finally:
        call.local['summary'] = False

    queries = t['queries']
    if self.dropout:
      queries = drop(queries, call.rng('query dropout'), self.dropout)
    keeps_slopes = any(seen.slopes for seen in call.local.values() if isinstance(seen, Seen))
    policy = jax.checkpoint_policies.save_only_these_names(SLOPES) if keeps_slopes else None
    again = remat_if(self.remat or keeps_slopes, summarise, policy=policy)
    z = again(queries.astype(first.dtype))
    z = z.reshape(batch, -1)
    if self.norm:
      z = features.unit(z)
    call.tap(vote=features.vote(t, z))
    features.penalise(call, self.name, t, self.lasso)
    return out

  def check_arguments(self, call, args, kwargs) -> None:
    """Raises a ValueError if an argument of a block goes by the positions of its tokens."""
    inputs = call.inputs(*args, **kwargs)
    batch, length = next(iter(inputs.values())).shape[:2]
    seen_by_attention = mask_names(inputs)
    for name, value in call.beside(args, kwargs).by_name().items():
      if name in seen_by_attention or is_of_other_sequence(name):
        continue
      for x in jax.tree.leaves(value):
        is_bias = x.ndim > 2 and x.shape[-1] == length
        if has_length(x, batch, length) and not is_bias:
          raise ValueError(
            f'{self.name}: {name!r} of the block {call.site.path!r}, {list(x.shape)}, goes by the '
            'position of a token, and a summary has none'
          )

  # The attention in it, which stores keys and values in the first run and reads them in the second.

  def apply_attention(self, t, call, *args, **kwargs):
    """Runs the attention: on all tokens as it is, on q_i with the keys and values of those."""
    block = call.outer
    path = call.site.path

    def wrap(attention_fn):
      def attend(query, key, value, *rest, **named):
        if not block.get('summary'):
          seen = jax.lax.stop_gradient((key, value))
          block[path] = Seen(*seen, self.keeps_slopes(query, key, value))
          return attention_fn(query, key, value, *rest, **named)
        key, value, keeps_slopes = block[path]
        mask = named_options(rest, named).get('mask')
        made = query.shape[-3], None if mask is None else mask.shape[-1]
        if made not in ((self.tokens, None), (self.tokens, key.shape[-3])):
          raise ValueError(
            f'{self.name}: the attention {path!r} makes mask or queries by the positions of its '
            'own tokens, and a summary has none'
          )
        options = self.options_of_queries(path, named_options(rest, named))

        def read(query):
          return attention_fn(query, key, value, **options)

        if keeps_slopes:
          return along_slopes(read, query)
        return read(query)

      return attend

    return call.attend(wrap, *args, **kwargs)

  def keeps_slopes(self, query, key, value) -> bool:
    """Whether the backward pass keeps the slopes of an attention, not its keys and values."""
    if self.keep is not None or self.remat:
      return self.keep == SLOPES
    of_a_query = query.size // query.shape[-3] * value.shape[-1]  # query: [.., N, heads, e]
    return self.tokens * of_a_query < key.size + value.size

  def options_of_queries(self, path: str, options: dict) -> dict:
    """The further arguments of an attention function, where the queries are q_i.

    Raises:
      ValueError: a bias that differs from query to query.
    """
    options = dict(options)
    options.pop('is_causal', None)  # a summary is no token of the sequence: none comes after it
    bias = options.get('bias')
    if bias is not None and bias.shape[-2] != 1:
      raise ValueError(
        f'{self.name}: the bias of {path!r} goes by the position of a query, and a summary has none'
      )
    mask = options.get('mask')
    if mask is not None:  # [.., N, N] to [.., 1, N]: what any token sees
      options['mask'] = jnp.any(mask, -2, keepdims=True)
    return options


def along_slopes(read: Callable[[jax.Array], jax.Array], query: jax.Array) -> jax.Array:
  """read(query), whose gradient keeps nothing of `read` but its slopes at the query.

  Args:
    read: queries [.., e] -> outputs [.., f], each output of the query at its own place alone.
    query: [.., e].
  """
  start = jax.lax.stop_gradient(query)
  out, pull = jax.vjp(read, start)

  def row(unit):  # [f] to the slopes [.., e] of one feature of the outputs
    return pull(jnp.broadcast_to(unit, out.shape))[0]

  slopes = jax.vmap(row, out_axes=-2)(jnp.eye(out.shape[-1], dtype=out.dtype))  # [.., f, e]
  shape = slopes.shape
  # Kept flat: rows of a head's width would be padded where the device's rows are wider.
  flat = slopes.reshape(*shape[:-2], -1)
  out, flat = checkpoint_name(jax.lax.stop_gradient((out, flat)), SLOPES)
  # The difference is zero, and its gradient is that of the query.
  return out + jnp.einsum('...e,...fe->...f', query - start, flat.reshape(shape))


def _std(classes: int) -> float:
  """Of the initial weights of the head: He's, by the number of outputs."""
  return math.sqrt(2 / classes)
