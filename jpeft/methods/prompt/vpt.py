"""Visual prompt tuning: learned tokens among those of a frozen transformer.

Jia et al., 2022 (arXiv 2203.12119); official code KMnP/vpt. With the tokens [cls; patches] and p
prompts P,

  shallow   z_1 = [cls; drop(P); patches] enters the first block, and the prompts go on with the
            other tokens;
  deep      z_i = [cls; drop(P_i); patches] enters every block, and its output at the prompts is
            dropped.

The latter equals the official replacement of the prompts before the next block, since nothing else
reads them. Entries of P start as U(-a, a), a = sqrt(6 / (fan_in + D)), fan_in = 3 * patch height *
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

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Call, Method, Site, at, factory

from ..check import whole, within
from ..masks import is_of_other_sequence, reads_other_sequence, seen_keys
from ..nn import drop, uniform


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
  _check('vpt_deep', tokens, dropout)

  def init(key, site, arrays):
    return _init(key, tokens, site, site.input)

  def apply(t, call, *args, **kwargs):
    args, kwargs = enter(call, args, kwargs, tokens, _prompts(t, call, dropout))
    out = call(*args, **kwargs)
    return call.site.map_stream(out, lambda x: remove_tokens(call.site, x, tokens))

  return at(blocks, Call(name, apply, init))


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
  _check('vpt_shallow', tokens, dropout)
  return _Shallow(tokens, dropout, stack, name).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _Shallow:
  """The rules of `vpt_shallow`; the fields are its arguments."""

  tokens: int
  dropout: float
  stack: str
  name: str

  def method(self) -> Method:
    return at(self.stack, Call(self.name, self.apply, self.init))

  def ends(self, site: Site) -> tuple[bool, bool]:
    """(whether a module is the first of the stack, whether it is the last)."""
    called = [found for found in site.model.find(self.stack) if '__call__' in found.methods]
    return site is called[0], site is called[-1]

  def init(self, key, site: Site, arrays) -> dict:
    first, last = self.ends(site)
    if site.axes and (first or last):
      raise ValueError(
        f'{self.name}: no sequence can grow or shrink inside the scanned stack {site.path!r}; name '
        'the modules before and after it too, such as '
        f"stack='position_embedding|{site.path}|final_norm'"
      )
    if not first:
      return {}
    sequence = site.out
    if _runs_modules(site):
      sequence = site.input
    return _init(key, self.tokens, site, sequence)

  def apply(self, t, call, *args, **kwargs):
    """Runs one module of the stack; the prompts enter at the first, and leave at the last."""
    first, last = self.ends(call.site)
    prompts = None
    if first:
      prompts = _prompts(t, call, self.dropout)

    def insert(x):
      return _insert(call.site, x, prompts(x))

    def remove(x):
      return remove_tokens(call.site, x, self.tokens)

    if _runs_modules(call.site):  # its sequence has the prompts, which enter with its input
      args, kwargs = enter(call, args, kwargs, self.tokens, prompts)
      out = call(*args, **kwargs)
      if last:
        out = call.site.map_stream(out, remove)
      return out
    # The prompts stay outside of it: they enter behind the first module, and leave before the last.
    if last:
      args, kwargs = on_stream(call, args, kwargs, remove)
    out = call(*args, **kwargs)
    if first:
      out = call.site.map_stream(out, insert)
    return out


def _runs_modules(site: Site) -> bool:
  """Whether a module has others in it; a position embedding or a norm has none."""
  return any(path.startswith(f'{site.path}/') for path in site.model)


def _check(method: str, tokens: int, dropout: float) -> None:
  whole(method, 'tokens', tokens, 0)
  within(method, 'dropout', dropout, 0, 1)


# The prompts


def _init(key, tokens: int, site: Site, sequence: jax.ShapeDtypeStruct | None) -> dict:
  """{'prompts': [p, D]} for a sequence [B, N, D]."""
  shape = None
  if sequence is not None:
    shape = sequence.shape
  if shape is None or len(shape) != 3:
    raise ValueError(f'prompts need tokens [B, N, D], and {site.kind} at {site.path!r} has {shape}')
  width = shape[-1]
  return {'prompts': uniform(key, (tokens, width), spread_of(site, width))}


def spread_of(site: Site, width: int) -> float:
  """a of the initial U(-a, a): sqrt(6 / (fan_in of a patch, else the width, + the width))."""
  fan_in = width
  if site.model.anatomy:
    for patch in site.model.find('{patch}'):
      for leaf in patch.leaves.values():
        if leaf.is_matrix:
          fan_in = leaf.fan_in  # of the last one, should there be several
  return math.sqrt(6 / (fan_in + width))


def _prompts(t, call: Bound, rate: float) -> Callable[[jax.Array], jax.Array]:
  """x [B, N, D] -> the prompts [B, p, D] beside it; every example has a dropout of its own."""

  def make(x):
    rows = t['prompts'].astype(x.dtype)
    prompts = jnp.broadcast_to(rows, (len(x), *rows.shape))
    key = None
    if rate:
      key = call.rng('prompt dropout')
    return drop(prompts, key, rate)

  return make


# A call on a sequence with more tokens


def enter(
  call: Bound, args, kwargs, tokens: int, prompts: Callable[[jax.Array], jax.Array] | None
) -> tuple[list, dict]:
  """The arguments of a call whose sequence has prompts.

  Args:
    call: of the module.
    args, kwargs: its arguments, of which those that go with the sequence are of its own tokens.
    tokens: how many prompts there are.
    prompts: x [B, N, D] -> the prompts [B, p, D], which are put into x; None where x has them
      already.
  """
  x = next(iter(call.inputs(*args, **kwargs).values()))
  length = x.shape[1]
  if prompts is None:
    length -= tokens

  def stream(x):
    if prompts is None:
      return x
    return _insert(call.site, x, prompts(x))

  def other(name, a):
    return _follow(call.site, name, a, len(x), length, tokens)

  return on_stream(call, args, kwargs, stream, other)


def on_stream(
  call: Bound, args, kwargs, stream: Callable, other: Callable = lambda name, a: a
) -> tuple[list, dict]:
  """The arguments of a call: stream(x) for the first array, other(name, a) for the further ones."""
  named = call.inputs(*args, **kwargs)
  x = next(iter(named.values()))
  # By identity: args and kwargs have no parameter names, and are passed on in the form they came.
  names = {id(a): name for name, a in named.items()}

  def changed(a):
    if a is x:
      return stream(a)
    if id(a) in names:
      return other(names[id(a)], a)
    return a

  args = [changed(a) for a in args]
  kwargs = {name: changed(a) for name, a in kwargs.items()}
  return args, kwargs


def _follow(site: Site, name: str, a: jax.Array, batch: int, length: int, tokens: int) -> jax.Array:
  """An argument of a block, for `tokens` prompts more if it goes with the sequence.

  Args:
    site: the block.
    name: of the argument.
    a: a mask, a bias, positions, or something else.
    batch: B.
    length: how many tokens the sequence has without the prompts.
    tokens: how many prompts there are.

  Raises:
    ValueError: it goes with the sequence, and is none of these.
  """
  is_other = reads_other_sequence(site.inputs) and is_of_other_sequence(name)
  if is_other or not _has_length(a, batch, length):
    return a
  lead = lead_of(site)
  if 'position' in name and jnp.issubdtype(a.dtype, jnp.integer):
    # The prompts take the positions after the special tokens; those of later tokens move by p.
    new = lead + jnp.arange(tokens, dtype=a.dtype)
    new = jnp.broadcast_to(new, (*a.shape[:-1], tokens))
    return jnp.concatenate([a[..., :lead], new, a[..., lead:] + tokens], -1)
  if a.shape[-1] not in (length, 1) or length not in a.shape[-2:]:
    raise ValueError(
      f'{name} {list(a.shape)} of {site.path!r} goes with its {length} tokens, and nothing is '
      f'known of what it would be for {tokens} prompts'
    )
  has_queries = a.ndim > 2 or (a.ndim == 2 and a.shape[0] != batch)  # [B, N] has none
  if has_queries and a.shape[-2] == length:
    row = a[..., :1, :]  # what the first token sees
    rows = jnp.broadcast_to(row, (*a.shape[:-2], tokens, a.shape[-1]))
    a = jnp.concatenate([a[..., :lead, :], rows, a[..., lead:, :]], -2)
  if a.shape[-1] == length:
    a = jnp.concatenate([a[..., :lead], seen_keys(a, tokens), a[..., lead:]], -1)
  return a


def _has_length(a: jax.Array, batch: int, length: int) -> bool:
  """Whether an array has an axis of tokens: of this length, and not the axis of examples."""
  if length in a.shape[1:]:
    return True
  return a.shape[:1] == (length,) and length != batch


# The place of the prompts


def lead_of(site: Site) -> int:
  """How many special tokens stand before the others."""
  return site.model.lead


def _insert(site: Site, x: jax.Array, prompts: jax.Array) -> jax.Array:
  """The sequence [B, N, D] with prompts [B, p, D] behind the leading special tokens."""
  lead = lead_of(site)
  return jnp.concatenate([x[:, :lead], prompts, x[:, lead:]], 1)


def remove_tokens(site: Site, x: jax.Array, tokens: int) -> jax.Array:
  """The sequence without `tokens` tokens behind the leading special ones."""
  lead = lead_of(site)
  return jnp.concatenate([x[:, :lead], x[:, lead + tokens :]], 1)
