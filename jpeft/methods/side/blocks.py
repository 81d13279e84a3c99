"""Side blocks: the backbone's own block class at reduced width, or a lean block that any backbone
takes.

A side block maps a narrow stream [B, N, d'] to itself. It runs beside the model, never inside it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from einops import rearrange

from jpeft.core import Site, TokenMask, dot_product_attention, flags_of

from ..masks import additive, mask_names, numbers_texts

# Names of fields that hold a width; numbers of heads are none.
_WIDTH = re.compile(
  r'(?!.*heads)(.*_)?(dim|width|features|size|hidden|inner|d_model|d_ff|d_kv)(_.*)?'
)


@dataclasses.dataclass(frozen=True)
class SideBlock:
  """A side block as two pure functions.

  Attributes:
    init: (key, s, inputs) -> params, for s [B, N, d'] and the block's further array inputs by name.
    run: (params, s, inputs, training, key, cache) -> (s, cache). `cache` are keys and values of the
      tokens before, {} at first, where the block stores them; None to store none.
    takes: the names of the array inputs it uses; None for all.
    mixes: whether tokens attend to each other in it.
  """

  init: Callable[..., Any]
  run: Callable[..., tuple[jax.Array, Any]]
  takes: tuple[str, ...] | None
  mixes: bool


class Lean(nn.Module):
  """A pre-norm residual block without biases that needs little memory.

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
  def __call__(self, s, mask=None, context=None, context_mask=None, texts=None):
    """s after the block, [B, N, d'].

    Args:
      s: the stream [B, N, d'].
      texts: number of the text that each token belongs to, [B, N]: it sees the others of it.
      mask: bias of the logits [B or 1, 1, 1 or N, N]; None for none.
      context: another sequence [B, M, d'] to attend to; None for none.
      context_mask: bias of the logits [B or 1, 1, 1 or N, M] for it.
    """
    width = s.shape[-1]

    def dense(features, name):
      return nn.Dense(features, use_bias=False, dtype=s.dtype, name=name)

    def norm(name):
      return nn.RMSNorm(dtype=s.dtype, name=name)

    def attend(prefix, x, source, bias, seen=None):
      def project(name, y):
        y = dense(width, f'{prefix}{name}')(y)
        return rearrange(y, 'b n (h c) -> b n h c', h=self.heads)

      query = project('query', x)
      key = project('key', source)
      value = project('value', source)
      y = dot_product_attention(query, key, value, bias, seen)
      return dense(width, f'{prefix}out')(rearrange(y, 'b n h c -> b n (h c)'))

    if self.heads:
      seen = None
      if self.causal or texts is not None:
        seen = TokenMask.of_row(s.shape[1], texts, causal=self.causal)
      x = norm('norm1')(s)
      s = s + attend('', x, x, mask, seen)
      if context is not None:
        s = s + attend('cross_', norm('norm_cross')(s), context, context_mask)
    hidden = nn.gelu(dense(self.expand * width, 'fc1')(norm('norm2')(s)))
    return s + dense(width, 'fc2')(hidden)


def lean_block(
  site: Site, heads: int, width: int, causal: bool, contexts: Sequence[str] = ('context',)
) -> SideBlock:
  """A `Lean` block for a stream of some width.

  Args:
    site: the backbone's block. Of its inputs the side block uses masks and contexts.
    heads: see Lean.
    width: of the stream.
    causal: see Lean.
    contexts: its inputs that are another sequence to attend to; `Lean` has one.

  Raises:
    ValueError: the heads do not divide the width.
  """
  if heads and width % heads:
    raise ValueError(f'{heads} heads do not divide the side width {width}')
  block = Lean(heads, causal=causal)
  kinds = {}
  takes = ()
  if heads:
    kinds = mask_names(site.inputs)
    takes = (*kinds, *(name for name in contexts if name in site.inputs))

  def arguments(s, inputs):
    """The keyword arguments of `Lean`."""
    found = {}
    for name, kind in kinds.items():
      if name not in inputs:
        continue
      mask = inputs[name]
      if kind == 'mask' and numbers_texts(mask):
        found['texts'] = mask
      else:
        found[kind] = additive(mask, s.dtype, len(s))
    for name in contexts:
      if name in takes and name in inputs:
        found['context'] = inputs[name]
    return found

  def init(key, s, inputs):
    return block.init(key, s, **arguments(s, inputs))['params']

  def run(params, s, inputs, training, key, cache=None):
    return block.apply({'params': params}, s, **arguments(s, inputs)), cache

  return SideBlock(init, run, takes, mixes=bool(heads))


def own_block(site: Site, reduction: int) -> SideBlock:
  """The block at a site, its class and fields, with every width divided by `reduction`.

  Args:
    site: a block of a Linen model.
    reduction: r.

  Raises:
    ValueError: the class is not Linen.
  """
  if site.module is None:
    raise ValueError(
      f'the {site.kind} at {site.path!r} cannot be made again at another width (only '
      "Linen blocks can); use block='attention' or block='mlp'"
    )
  widths = {}
  for field in dataclasses.fields(site.module):
    value = getattr(site.module, field.name)
    if type(value) is int and _WIDTH.fullmatch(field.name):  # bool is an int to isinstance
      widths[field.name] = value // reduction
  block = site.module.clone(**widths)
  flags = functools.partial(flags_of, type(block).__call__)

  def init(key, s, inputs):
    keys = {'params': key, 'dropout': key}
    return block.init(keys, s, **inputs, **flags(False))['params']

  def run(params, s, inputs, training, key, cache=None):
    variables = {'params': params}
    rngs = {}
    if key is not None:
      rngs['dropout'] = key
    apply = functools.partial(block.apply, **inputs, **flags(training), rngs=rngs)
    if cache is None:
      out = apply(variables, s)
    else:
      if cache:
        variables['cache'] = cache
      out, state = apply(variables, s, mutable=['cache'])
      cache = state.get('cache', {})
    return site.stream(out), cache

  return SideBlock(init, run, None, mixes=True)


def check_block(
  block: SideBlock, s: jax.ShapeDtypeStruct, inputs: Mapping[str, Any], what: str
) -> None:
  """Runs a side block on shapes alone.

  Args:
    block: the side block.
    s: shape of the stream.
    inputs: shapes of the further inputs.
    what: name of the block in the error.

  Raises:
    ValueError: it fails, or does not return the stream it was given.
  """

  def run(key, s, inputs):
    out, _ = block.run(block.init(key, s, inputs), s, inputs, False, None)
    return out

  problem = None
  try:
    out = jax.eval_shape(run, jax.random.key(0), s, inputs)
    if out.shape != s.shape:
      problem = f'it returns {out.shape} for {s.shape}'
  except Exception as error:  # whatever a third party's block raises at a width it was not made for
    problem = str(error).splitlines()[0]
  if problem:
    raise ValueError(
      f'{what} does not work at width {s.shape[-1]}: {problem}; '
      "use block='attention' or block='mlp'"
    )
