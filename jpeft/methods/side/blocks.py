"""Side blocks: the backbone's own block class at reduced width, or a lean block that any backbone
takes.

A side block maps a narrow stream [B, N, d'] to itself. It runs beside the model, never inside it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import Site, flags_of

from ..masks import apart

_WIDTH = re.compile(
  r'(?!.*heads)(.*_)?(dim|width|features|size|hidden|inner|d_model|d_ff|d_kv)(_.*)?'
)


@dataclasses.dataclass(frozen=True)
class SideBlock:
  """A side block as two pure functions.

  Attributes:
    init: (key, s, inputs) -> params, for s [B, N, d'] and the block's further array inputs by name.
    run: (params, s, inputs, training, key, cache) -> (s, cache): keys and values of the tokens
      before, where the block keeps them; with None for `cache` nothing is kept.
    takes: the names of the array inputs it uses; None for all.
    mixes: whether tokens meet in it.
  """

  init: Callable[..., Any]
  run: Callable[..., tuple[jax.Array, Any]]
  takes: tuple[str, ...] | None
  mixes: bool


class Lean(nn.Module):
  """A pre-norm residual block without biases that asks little memory.

  One attention head keeps one [N, N] map a layer where the backbone's head count would keep many;
  without heads the block is an MLP, and tokens mix in the backbone alone.

  Attributes:
    heads: attention heads; 0 for none.
    expand: hidden width of the MLP over the width of the stream.
    causal: whether a token sees only those before it.
  """

  heads: int
  expand: int = 4
  causal: bool = False

  @nn.compact
  def __call__(self, s, bias=None, context=None, context_bias=None):
    """s [B, N, d'], context [B, M, d'] or None, biases of the logits [B, 1, 1 or N, N or M]."""
    width = s.shape[-1]
    dense = lambda n, name: nn.Dense(n, use_bias=False, dtype=s.dtype, name=name)
    norm = lambda name: nn.RMSNorm(dtype=s.dtype, name=name)(s)

    def attend(prefix, x, source, bias):
      split = lambda y: y.reshape(*y.shape[:-1], self.heads, width // self.heads)
      q = split(dense(width, f'{prefix}query')(x))
      k, v = (split(dense(width, f'{prefix}{n}')(source)) for n in ('key', 'value'))
      y = nn.dot_product_attention(q, k, v, bias=bias)
      return dense(width, f'{prefix}out')(y.reshape(s.shape))

    if self.heads:
      if self.causal:
        causal = additive(jnp.tril(jnp.ones((s.shape[1], s.shape[1]), bool)), s.dtype)
        bias = causal if bias is None else bias + causal
      x = norm('norm1')
      s = s + attend('', x, x, bias)
      if context is not None:
        s = s + attend('cross_', norm('norm_cross'), context, context_bias)
    return s + dense(width, 'fc2')(nn.gelu(dense(self.expand * width, 'fc1')(norm('norm2'))))


def additive(mask: jax.Array, dtype) -> jax.Array:
  """Any mask as a bias of attention logits [B or 1, 1, 1 or N, N]: floats are one already."""
  if not jnp.issubdtype(mask.dtype, jnp.floating):
    mask = jnp.where(mask != 0, 0.0, jnp.finfo(dtype).min / 2)
  mask = mask[:, None, None] if mask.ndim == 2 and mask.shape[0] != mask.shape[1] else mask
  return mask.astype(dtype).reshape((1,) * (4 - mask.ndim) + mask.shape)


def lean(site: Site, heads: int, width: int, causal: bool) -> SideBlock:
  """A `Lean` block for a stream of some width.

  Args:
    site: the backbone's block; of what it is called with, masks are used, and a context if it has
      one.
    heads: see Lean.
    width: of the stream.
    causal: see Lean.

  Raises:
    ValueError: the heads do not divide the width.
  """
  if heads and width % heads:
    raise ValueError(f'{heads} heads do not divide the side width {width}')
  block = Lean(heads, causal=causal)
  masks = [n for n in list(site.inputs)[1:] if 'mask' in n] if heads else []
  roles = {n: 'context_bias' if re.search('context|cross|encoder', n) else 'bias' for n in masks}
  takes = (*masks, *(n for n in site.inputs if heads and n == 'context'))

  def named(s, inputs):
    own = {n: apart(inputs[n]) if roles[n] == 'bias' else inputs[n] for n in masks if n in inputs}
    biases = {roles[n]: additive(mask, s.dtype) for n, mask in own.items()}
    return biases | {n: x for n, x in inputs.items() if n == 'context' and heads}

  def init(key, s, inputs):
    return block.init(key, s, **named(s, inputs))['params']

  def run(params, s, inputs, training, key, cache=None):
    return block.apply({'params': params}, s, **named(s, inputs)), cache

  return SideBlock(init, run, takes, bool(heads))


def own(site: Site, reduction: int) -> SideBlock:
  """The block at a site, its class and fields, with every width divided by `reduction`.

  Args:
    site: a block of a Linen model.
    reduction: r.

  Raises:
    ValueError: the class is not Linen, or does not work at the reduced width.
  """
  if site.module is None:
    raise ValueError(
      f'the {site.kind} at {site.path!r} cannot be made again at another width (only '
      "Linen blocks can); use block='attention' or block='mlp'"
    )
  fields = {f.name: getattr(site.module, f.name) for f in dataclasses.fields(site.module)}
  widths = {n: v // reduction for n, v in fields.items() if type(v) is int and _WIDTH.fullmatch(n)}
  block = site.module.clone(**widths)
  call = functools.partial(flags_of, type(block).__call__)

  def init(key, s, inputs):
    keys = {'params': key, 'dropout': key}
    return block.init(keys, s, **inputs, **call(False))['params']

  def run(params, s, inputs, training, key, cache=None):
    rngs = {} if key is None else {'dropout': key}
    if cache is None:
      out = block.apply({'params': params}, s, **inputs, **call(training), rngs=rngs)
    else:
      variables = {'params': params, **({'cache': cache} if cache else {})}
      out, state = block.apply(
        variables, s, **inputs, **call(training), rngs=rngs, mutable=['cache']
      )
      cache = state.get('cache', {})
    return jax.tree.leaves(out)[0], cache

  return SideBlock(init, run, None, True)


def check(block: SideBlock, s: jax.ShapeDtypeStruct, inputs: dict, what: str) -> None:
  """Tries a side block on shapes.

  Raises:
    ValueError: it fails, or does not return the stream it was given.
  """

  def run(key, s, inputs):
    return block.run(block.init(key, s, inputs), s, inputs, False, None)[0]

  try:
    out = jax.eval_shape(run, jax.random.key(0), s, inputs)
    problem = None if out.shape == s.shape else f'it returns {out.shape} for {s.shape}'
  except Exception as error:  # whatever a third party's block raises at a width it was not made for
    problem = str(error).splitlines()[0]
  if problem:
    raise ValueError(
      f'{what} does not work at width {s.shape[-1]}: {problem}; '
      "use block='attention' or block='mlp'"
    )
