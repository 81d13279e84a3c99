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
in the first run, so that no gradient of the width of N tokens exists: the backward pass keeps k and
v, or, with `remat`, x. The official code runs one sequence [q; x] and keeps everything. Both give
the same numbers.

q ~ U(-a, a), a as for prompts; W ~ N(0, 2 / C), b = -log 99, a prior of one hundredth.
`lasso` and `select` are the paper's compression; dropout falls on q.

Deviations. Dropout of the backbone is what the model's own flag says; the authors run it in eval
mode. Masks of the model let a summary see what any token sees. The ablations (pooled summaries) are
left out.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, at, chain, factory

from ..arguments import on_first
from ..check import at_least, whole, within
from ..keys import named_options
from ..masks import has_length, is_of_other_sequence, mask_names
from ..nn import drop, remat_if, uniform
from ..prompt.vpt import spread_of
from . import features

_BIAS = -math.log(99)


@factory
def vqt(
  tokens: int = 1,
  dropout: float = 0.1,
  norm: bool = True,
  remat: bool = False,
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
  return _VQT(tokens, dropout, norm, remat, blocks, attention, head, lasso, name).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _VQT:
  """The hyperparameters of `vqt`, and its rules as methods.

  A block's rule and that of the attention in it share the block's `local`, where the attention
  finds 'summary', whether the block runs on q_i, and stores its keys and values by its own path.
  """

  tokens: int
  dropout: float
  norm: bool
  remat: bool
  blocks: str
  attention: str
  head: str
  lasso: float
  name: str

  def __post_init__(self):
    whole('vqt', 'tokens', self.tokens, 1)
    within('vqt', 'dropout', self.dropout, 0, 1)
    at_least('vqt', 'lasso', self.lasso, 0)

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
    z = remat_if(self.remat, summarise)(queries.astype(first.dtype))
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
          block[path] = jax.lax.stop_gradient((key, value))
          return attention_fn(query, key, value, *rest, **named)
        key, value = block[path]
        mask = named_options(rest, named).get('mask')
        made = query.shape[-3], None if mask is None else mask.shape[-1]
        if made not in ((self.tokens, None), (self.tokens, key.shape[-3])):
          raise ValueError(
            f'{self.name}: the attention {path!r} makes mask or queries by the positions of its '
            'own tokens, and a summary has none'
          )
        options = self.options_of_queries(path, named_options(rest, named))
        return attention_fn(query, key, value, **options)

      return attend

    return call.attend(wrap, *args, **kwargs)

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


def _std(classes: int) -> float:
  """Of the initial weights of the head: He's, by the number of outputs."""
  return math.sqrt(2 / classes)
