"""Visual prompt tuning: learned tokens among those of a frozen transformer.

Jia et al., 2022 (arXiv 2203.12119); official code KMnP/vpt. With the tokens [cls; patches] and p
prompts P,

  shallow   z_1 = [cls; drop(P); patches] enters the first block, and the prompts travel with the others;
  deep      z_i = [cls; drop(P_i); patches] enters every block, and what it gives at the prompts is dropped.

That is the official replacement of the prompts before the next block, which nothing else ever
reads. Entries of P start as U(-a, a), a = sqrt(6 / (fan_in + D)), fan_in = 3 * patch height *
width: 0.0625 for 16 x 16 and D = 768. In a model without a patch layer fan_in is D. The function
does not start as the backbone.

The prompts stand behind the leading special tokens that the anatomy counts, first of all where
there are none (decoders). They leave the sequence before the final norm: read-outs by index stay
right, and a mean over tokens is a mean over the model's own tokens. The arguments of a block that
go with the sequence follow it: everyone sees the prompts (masks True, integers one, additive biases
zero), the prompts see what the first token sees, positions behind them move by p. The contexts of a
cross attention stay as they are.

Deviations. The projection of narrower prompts (off by default in the official code) is left out.
The head's initial bias of the paper belongs to the head. Not mergeable.
"""

import math

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Site, at, factory

from ..nn import drop, on_first

_ELSEWHERE = (
  'context',
  'cross',
  'encoder',
  'memory',
)  # in the names of arguments about another sequence


@factory
def vpt_deep(
  tokens: int = 5, dropout: float = 0.0, blocks: str = '{block}', name: str = 'vpt_deep'
) -> Method:
  """Fresh prompts in every block.

  Args:
    tokens: p.
    dropout: rate on the entries of the prompts.
    blocks: pattern of the blocks.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a block that reads no token
      sequence.
  """
  _check(tokens, dropout)

  def apply(t, call, *args, **kwargs):
    args, kwargs = enter(call, args, kwargs, tokens, _prompts(t, call, dropout))
    return on_first(call(*args, **kwargs), lambda x: remove_tokens(call.site, x, tokens))

  return at(
    blocks, Call(name, apply, lambda key, site, arrays: _init(key, tokens, site, site.input))
  )


@factory
def vpt_shallow(
  tokens: int = 5, dropout: float = 0.0, stack: str = '{stack}', name: str = 'vpt_shallow'
) -> Method:
  """Prompts in front of the first block, carried along to the last.

  Args:
    tokens: p.
    dropout: rate on the entries of the prompts.
    stack: pattern of what the tokens run through, in order. Into the first module it names the
      prompts enter with the input, out of the last they leave with the output; a module that runs
      no others (a position embedding, a norm) has them enter behind it and leave before it. By
      default a module that runs all blocks on its input, or the blocks. Of blocks that are one
      scanned stack, name what comes before and after them too, such as
      'position_embedding|blocks|norm'.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a place where the sequence cannot
      grow.
  """
  _check(tokens, dropout)

  def place(site: Site) -> tuple[bool, bool, bool]:
    """(whether it runs other modules, whether prompts enter here, whether they leave here)."""
    ends = [s for s in site.model.find(stack) if '__call__' in s.methods]
    runs = any(path.startswith(f'{site.path}/') for path in site.model)
    return runs, site is ends[0], site is ends[-1]

  def init(key, site, arrays):
    runs, first, last = place(site)
    if site.axes and (first or last):
      raise ValueError(
        f'{name}: no sequence can grow or shrink inside the scanned stack {site.path!r}; name '
        'the modules before and after it too, such as '
        f"stack='position_embedding|{site.path}|final_norm'"
      )
    return _init(key, tokens, site, site.input if runs else site.out) if first else {}

  def apply(t, call, *args, **kwargs):
    runs, first, last = place(call.site)
    remove = lambda x: remove_tokens(call.site, x, tokens)
    if runs:
      args, kwargs = enter(
        call, args, kwargs, tokens, _prompts(t, call, dropout) if first else None
      )
    elif last:
      args, kwargs = on_stream(call, args, kwargs, remove)
    out = call(*args, **kwargs)
    if first and not runs:
      out = on_first(out, lambda x: _insert(call.site, x, _prompts(t, call, dropout)(x)))
    return on_first(out, remove) if last and runs else out

  return at(stack, Call(name, apply, init))


def _check(tokens, dropout) -> None:
  if int(tokens) != tokens or tokens < 0:
    raise ValueError(f'tokens={tokens!r} must be a whole number, at least 0')
  if not 0 <= dropout <= 1:
    raise ValueError(f'dropout={dropout!r} must lie in [0, 1]')


def _init(key, tokens: int, site: Site, sequence) -> dict:
  shape = None if sequence is None else sequence.shape
  if shape is None or len(shape) != 3:
    raise ValueError(f'prompts need tokens [B, N, D], and {site.kind} at {site.path!r} has {shape}')
  bound = spread_of(site, shape[-1])
  return {'prompts': jax.random.uniform(key, (tokens, shape[-1]), minval=-bound, maxval=bound)}


def spread_of(site: Site, width: int) -> float:
  """a of the initial U(-a, a): sqrt(6 / (fan_in of a patch, else the width, + the width))."""
  patches = site.model.find('{patch}') if site.model.anatomy else []
  fans = [leaf.fan_in for s in patches for leaf in s.leaves.values() if leaf.is_matrix] or [width]
  return math.sqrt(6 / (fans[-1] + width))


def _prompts(t, call, rate: float):
  """The prompts [B, p, D] for a sequence x [B, N, D]; dropout falls on those of every example."""

  def make(x):
    p = jnp.broadcast_to(t['prompts'].astype(x.dtype), (len(x), *t['prompts'].shape))
    return drop(p, call.rng('prompt dropout') if rate else None, rate)

  return make


def enter(call, args, kwargs, tokens: int, prompts):
  """The arguments of a call on a sequence that has prompts; `prompts` is None where they are in
  already.
  """
  x = next(iter(call.inputs(*args, **kwargs).values()))
  length = x.shape[1] - (0 if prompts else tokens)
  stream = (lambda x: _insert(call.site, x, prompts(x))) if prompts else lambda x: x
  return on_stream(
    call, args, kwargs, stream, lambda name, a: _follow(call.site, name, a, len(x), length, tokens)
  )


def on_stream(call, args, kwargs, stream, other=lambda name, x: x):
  """The arguments of a call: stream(x) for the first array, other(name, x) for those that go with
  it.
  """
  named = call.inputs(*args, **kwargs)
  names, x = {id(a): name for name, a in named.items()}, next(iter(named.values()))
  put = lambda a: stream(a) if a is x else other(names[id(a)], a) if id(a) in names else a
  return [put(a) for a in args], {k: put(a) for k, a in kwargs.items()}


def _follow(site: Site, name: str, a, batch: int, length: int, tokens: int):
  """A mask, bias or table of positions of `length` tokens, for that many and prompts."""
  goes_along = length in a.shape[1:] or a.shape[:1] == (length,) != (batch,)
  if not goes_along or any(word in name for word in _ELSEWHERE):
    return a
  lead, rows = (
    lead_of(site),
    a.ndim > 2 or a.ndim == 2 and a.shape[0] != batch,
  )  # [B, N] has no axis of queries
  if 'position' in name and jnp.issubdtype(a.dtype, jnp.integer):
    new = jnp.broadcast_to(lead + jnp.arange(tokens, dtype=a.dtype), (*a.shape[:-1], tokens))
    return jnp.concatenate([a[..., :lead], new, a[..., lead:] + tokens], -1)
  if a.shape[-1] not in (length, 1) or length not in a.shape[-2:]:
    raise ValueError(
      f'{name} {list(a.shape)} of {site.path!r} goes with its {length} tokens, and nothing is '
      f'known of what it would be for {tokens} prompts'
    )
  if rows and a.shape[-2] == length:
    first = jnp.broadcast_to(a[..., :1, :], (*a.shape[:-2], tokens, a.shape[-1]))
    a = jnp.concatenate([a[..., :lead, :], first, a[..., lead:, :]], -2)
  if a.shape[-1] == length:
    seen = jnp.full(
      (*a.shape[:-1], tokens), 0 if jnp.issubdtype(a.dtype, jnp.floating) else 1, a.dtype
    )
    a = jnp.concatenate([a[..., :lead], seen, a[..., lead:]], -1)
  return a


def lead_of(site: Site) -> int:
  """How many special tokens stand before the others."""
  return site.model.anatomy.lead if site.model.anatomy else 0


def _insert(site: Site, x, prompts):
  lead = lead_of(site)
  return jnp.concatenate([x[:, :lead], prompts, x[:, lead:]], 1)


def remove_tokens(site: Site, x, tokens: int):
  """The sequence without `tokens` tokens behind the leading special ones."""
  lead = lead_of(site)
  return jnp.concatenate([x[:, :lead], x[:, lead + tokens :]], 1)
