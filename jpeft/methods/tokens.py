"""Tokens of a method among those of a model: they enter a sequence [B, N, D], and leave it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Site

from .arguments import first_array, on_first
from .check import whole
from .masks import conditions, has_length, is_of_other_sequence, reads_other_sequence

PLACES = ('lead', 'front', 'end')

# Parts of the names of arguments that hold what a decoder computed of earlier tokens.
_CACHES = ('cache', 'past')
_AGAIN = (
  'and the {} tokens of a method would enter at each call again: call without a cache, as '
  'jpeft.decoding.generate does, which runs the whole text for each token'
)


def check_no_windows(site: Site, sequence: jax.ShapeDtypeStruct) -> None:
  """Checks that attention in a module sees its whole sequence, so that tokens can be added to it.

  Args:
    site: the module.
    sequence: [B, N, D] that it is called with.

  Raises:
    ValueError: attention in it is called with pieces of the sequence, each a row of a larger batch.
  """
  anatomy = site.model.anatomy
  if anatomy is None or 'attention' not in anatomy.roles:
    return
  for found in site.model.find('{attention}'):
    inside = found.path.startswith(f'{site.path}/') and found.inputs and len(found.input.shape) == 3
    if not inside:
      continue
    rows, length = found.input.shape[:2]
    if rows > sequence.shape[0] and length < sequence.shape[1]:
      raise ValueError(
        f'tokens of a method have no place in {site.path!r}: its sequence has '
        f'{sequence.shape[1]} tokens, and {found.path!r} attends within windows of {length}'
      )


@dataclasses.dataclass(frozen=True)
class Tokens:
  """p tokens of a method at one place of a sequence [B, N, D].

  What a module is called with beside the sequence follows it. Of a mask or an additive bias, every
  token sees the method's, and these see what the first token sees. Positions of later tokens move
  by p. Arguments about another sequence, as of an encoder, stay as they are. A mask of floats is a
  bias where the module adds it, else ones and zeros, as those of `flax.linen.make_causal_mask`.

  Attributes:
    count: p.
    place: 'lead', behind the leading special tokens of the model's family; 'front', before all
      tokens; 'end', behind all; or a number of tokens that stand before them.
    causal: in masks [.., N, N] they are tokens like the others instead: they see what the token
      before them sees, and each other in order, and only later tokens see them.
  """

  count: int
  place: str | int = 'lead'
  causal: bool = False

  def __post_init__(self):
    whole('Tokens', 'count', self.count, 0)
    is_number = isinstance(self.place, int) and self.place >= 0
    if not is_number and self.place not in PLACES:
      raise ValueError(
        f"Tokens: place={self.place!r} must be 'lead', 'front', 'end' or a number of tokens"
      )

  # Around the call of a module

  def enter(self, call: Bound, args, kwargs, new: jax.Array) -> tuple[list, dict]:
    """The arguments of a call with the tokens in its sequence.

    Args:
      call: of a module whose first array is a sequence [B, N, D].
      args, kwargs: its arguments.
      new: [p, D], or [B, p, D] where examples have tokens of their own.

    Raises:
      ValueError: a shape that does not fit; an argument that goes with the sequence, and of which
        nothing is known for more tokens; a cache of earlier tokens, among which they would enter
        again at each call.
    """
    length = first_array(call, args, kwargs).shape[1]
    return self._follow(call, args, kwargs, length, lambda x: self.insert(call.site, x, new))

  def carry(
    self,
    call: Bound,
    args,
    kwargs,
    change: Callable[[jax.Array], jax.Array] | None = None,
  ) -> tuple[list, dict]:
    """The arguments of a call whose sequence has the tokens already, with those beside it.

    Args:
      call, args, kwargs: as for `enter`.
      change: tokens [B, p, D] -> what stands in their place, [p, D] or [B, p, D]; None leaves them.

    Raises:
      ValueError: as for `enter`.
    """

    def changed(x):
      if change is None:
        return x
      rest, tokens = self.remove(call.site, x)
      return self.insert(call.site, rest, change(tokens))

    length = first_array(call, args, kwargs).shape[1] - self.count
    return self._follow(call, args, kwargs, length, changed)

  def leave(self, call: Bound, out: Any) -> tuple[Any, jax.Array]:
    """(the output of a module without the tokens in its stream, what became of them [B, p, D])."""
    rest, tokens = self.remove(call.site, call.site.stream(out))
    return call.site.map_stream(out, lambda x: rest), tokens

  # In one array

  def insert(self, site: Site, x: jax.Array, new: jax.Array) -> jax.Array:
    """A sequence [B, N, D] with the tokens, [p, D] or [B, p, D], in it: [B, N + p, D].

    Raises:
      ValueError: a shape that does not fit.
    """
    if x.ndim != 3:
      raise ValueError(f'tokens enter a sequence [B, N, D], and {site.path!r} has {list(x.shape)}')
    start = self._start(site, x.shape[1])
    shape = (len(x), self.count, x.shape[-1])
    if new.shape not in (shape, shape[1:]):
      raise ValueError(
        f'the tokens that enter {site.path!r} are {list(shape[1:])} or {list(shape)}, not '
        f'{list(new.shape)}'
      )
    new = jnp.broadcast_to(new.astype(x.dtype), shape)
    return jnp.concatenate([x[:, :start], new, x[:, start:]], 1)

  def remove(self, site: Site, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a sequence [B, N + p, D] without the tokens [B, N, D], the tokens [B, p, D])."""
    start = self._start(site, x.shape[1] - self.count)
    end = start + self.count
    return jnp.concatenate([x[:, :start], x[:, end:]], 1), x[:, start:end]

  def _start(self, site: Site, length: int) -> int:
    """How many of the other tokens, `length` of them, stand before.

    Raises:
      ValueError: there are not as many.
    """
    places = {'lead': site.model.lead, 'front': 0, 'end': length}
    start = places.get(self.place, self.place)
    if start > length:
      raise ValueError(
        f'{self.count} tokens cannot stand behind {start} others in {site.path!r}: its sequence '
        f'has {length}'
      )
    return start

  # What goes with the sequence

  def _follow(
    self, call: Bound, args, kwargs, length: int, stream: Callable[[jax.Array], jax.Array]
  ) -> tuple[list, dict]:
    """The arguments of a call, stream(x) for the sequence; `length` is its own without the tokens.

    Raises:
      ValueError: see `enter`.
    """
    site = call.site
    batch = len(first_array(call, args, kwargs))
    if call.has_cache:
      raise ValueError(
        f'{site.path!r} is given a cache of earlier tokens, {_AGAIN.format(self.count)}'
      )

    selected: list[str] = []  # masks of floats that are no bias

    def other(name, a):
      is_other = reads_other_sequence(site.inputs) and is_of_other_sequence(name)
      leaves = [x for x in jax.tree.leaves(a) if hasattr(x, 'shape')]
      if not leaves or is_other:
        return a
      if _is_cache(name):
        raise ValueError(
          f'{name} of {site.path!r} is a cache of earlier tokens, {_AGAIN.format(self.count)}'
        )
      if hasattr(a, 'shape') and has_length(a, batch, length):
        is_bias = jnp.issubdtype(a.dtype, jnp.floating) and name not in selected
        return self.longer(site, name, a, batch, length, is_bias)
      for x in leaves:
        if x is not a and has_length(x, batch, length):
          raise _unknown(site, name, x, length, self.count)
      return a

    longer = on_first(call, args, kwargs, stream, other)
    selected += conditions(call, *longer)  # of the longer arguments, which fit each other
    if selected:
      longer = on_first(call, args, kwargs, stream, other)
    return longer

  def longer(
    self, site: Site, name: str, a: jax.Array, batch: int, length: int, is_bias: bool
  ) -> jax.Array:
    """An argument that goes with the sequence, for the tokens too.

    Args:
      site: the module.
      name: of the argument.
      a: a mask, a bias or positions, with an axis of `length`.
      batch: B.
      length: how many tokens the sequence has without these.
      is_bias: whether it is added to logits.

    Raises:
      ValueError: it is none of these.
    """
    start = self._start(site, length)
    count = self.count
    if 'position' in name and jnp.issubdtype(a.dtype, jnp.integer) and a.shape[-1] == length:
      # They take the positions from `start` on; those of later tokens move by p.
      new = start + jnp.arange(count, dtype=a.dtype)
      new = jnp.broadcast_to(new, (*a.shape[:-1], count))
      return jnp.concatenate([a[..., :start], new, a[..., start:] + count], -1)
    if a.shape[-1] not in (length, 1) or length not in a.shape[-2:]:
      raise _unknown(site, name, a, length, count)
    seen, hidden = 1, 0
    if is_bias:
      # Half the least number, so that the sum of two biases is finite.
      seen, hidden = 0, float(jnp.finfo(a.dtype).min) / 2
    has_queries = a.ndim > 2 or (a.ndim == 2 and a.shape[0] != batch)  # [B, N] has none
    has_queries = has_queries and a.shape[-2] == length
    if has_queries:
      before = 0  # whose row they have: what the first token sees
      if self.causal:
        before = max(start - 1, 0)
      row = a[..., before : before + 1, :]
      if self.causal and start == 0:  # there is no token that they could see
        row = jnp.full_like(row, hidden)
      rows = jnp.broadcast_to(row, (*a.shape[:-2], count, a.shape[-1]))
      a = jnp.concatenate([a[..., :start, :], rows, a[..., start:, :]], -2)
    if a.shape[-1] == length:
      keys = jnp.full((*a.shape[:-1], count), seen, a.dtype)
      if self.causal and has_queries:
        queries = jnp.arange(length + count)[:, None]
        is_seen = queries >= start + jnp.arange(count)
        keys = jnp.where(is_seen, keys, jnp.asarray(hidden, a.dtype))
      a = jnp.concatenate([a[..., :start], keys, a[..., start:]], -1)
    return a


def _is_cache(name: str) -> bool:
  """Whether an argument is a cache, by its name; `cache_position` is none."""
  return 'position' not in name and any(part in name for part in _CACHES)


def _unknown(site: Site, name: str, a: jax.Array, length: int, count: int) -> ValueError:
  return ValueError(
    f'{name} {list(a.shape)} of {site.path!r} goes with its {length} tokens, and nothing is known '
    f'of what it would be for {count} more'
  )
