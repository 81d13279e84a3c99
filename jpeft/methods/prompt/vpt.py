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

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Call, Method, Site, at, factory

from ..arguments import first_array, on_first
from ..check import whole, within
from ..nn import drop, uniform
from ..tokens import Tokens, check_no_windows


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
  prompts = Tokens(tokens)

  def init(key, site, arrays):
    return init_prompts(key, tokens, site, site.input)

  def apply(t, call, *args, **kwargs):
    new = dropped(t['prompts'], call, dropout, first_array(call, args, kwargs))
    args, kwargs = prompts.enter(call, args, kwargs, new)
    out, _ = prompts.leave(call, call(*args, **kwargs))
    return out

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
    return init_prompts(key, self.tokens, site, sequence)

  def apply(self, t, call, *args, **kwargs):
    """Runs one module of the stack; the prompts enter at the first, and leave at the last."""
    first, last = self.ends(call.site)
    prompts = Tokens(self.tokens)

    def insert(x):
      return prompts.insert(call.site, x, dropped(t['prompts'], call, self.dropout, x))

    def remove(x):
      rest, _ = prompts.remove(call.site, x)
      return rest

    if _runs_modules(call.site):  # its sequence has the prompts, which enter with its input
      if first:
        new = dropped(t['prompts'], call, self.dropout, first_array(call, args, kwargs))
        args, kwargs = prompts.enter(call, args, kwargs, new)
      else:
        args, kwargs = prompts.carry(call, args, kwargs)
      out = call(*args, **kwargs)
      if last:
        out = call.site.map_stream(out, remove)
      return out
    # The prompts stay outside of it: they enter behind the first module, and leave before the last.
    if last:
      args, kwargs = on_first(call, args, kwargs, remove)
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


def init_prompts(key, tokens: int, site: Site, sequence: jax.ShapeDtypeStruct | None) -> dict:
  """{'prompts': [p, D]} for a sequence [B, N, D]."""
  shape = None
  if sequence is not None:
    shape = sequence.shape
  if shape is None or len(shape) != 3:
    raise ValueError(f'prompts need tokens [B, N, D], and {site.kind} at {site.path!r} has {shape}')
  check_no_windows(site, sequence)
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


def dropped(prompts: jax.Array, call: Bound, rate: float, x: jax.Array) -> jax.Array:
  """Prompts [p, D] as [B, p, D] beside x [B, N, D]; every example has a dropout of its own."""
  rows = prompts.astype(x.dtype)
  prompts = jnp.broadcast_to(rows, (len(x), *rows.shape))
  key = None
  if rate:
    key = call.rng('prompt dropout')
  return drop(prompts, key, rate)
