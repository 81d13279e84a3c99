"""Attention on a mesh of devices: each attends for its own examples and heads, and its own queries.

The compiler cuts whole scores by heads, but not a loop over the heads: it would gather queries,
keys and values, and let each device compute all heads.

Where tokens are cut too, a device gathers the keys and values of its examples and heads over that
axis, and attends for its queries alone (context parallelism by gathered keys and values, Llama 3,
arXiv 2407.21783, section 3.3.2). Their gradients are summed and scattered on the way back. What is
kept for that are its own keys and values: they are gathered once more.

Axes: B batch, N queries, M keys, H query heads, J key and value heads, K head size.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .token_mask import TokenMask


@dataclasses.dataclass(frozen=True)
class _Axes:
  """The mesh, and its axes that examples, heads and tokens are cut over; None for those uncut."""

  mesh: Mesh
  examples: str
  heads: str | None
  tokens: str | None

  def over(self, axis: str | None, size: int) -> str | None:
    """The axis, if it divides what is to be cut."""
    parts = self.mesh.shape.get(axis, 1)
    return None if parts == 1 or size % parts else axis


_axes: contextvars.ContextVar[_Axes | None] = contextvars.ContextVar('jpeft_heads', default=None)


@contextlib.contextmanager
def heads_over(
  mesh: Mesh, examples: str, heads: str | None, tokens: str | None = None
) -> Iterator[None]:
  """A context in which attention in long contexts is cut over axes of a mesh.

  Args:
    mesh: of all devices that the program runs on.
    examples, heads, tokens: axes of the mesh; what does not divide by its axis is not cut. Queries
      may be cut and keys not, or the other way round. An axis that the mesh has not cuts nothing.
  """
  token = _axes.set(_Axes(mesh, examples, heads, tokens))
  try:
    yield
  finally:
    _axes.reset(token)


def by_devices(run: Callable[..., jax.Array], query, key, value, bias, mask, **options):
  """run(query, key, value, bias, mask, **options), on each device for its part.

  Args:
    run: an attention function; for the arguments see `dot_product_attention`.
  """
  axes = _axes.get()
  if axes is None:
    return run(query, key, value, bias, mask, **options)
  batch, length, heads, _ = query.shape
  examples = axes.over(axes.examples, batch)
  over_heads = axes.over(axes.heads, heads)
  tokens = axes.over(axes.tokens, length)
  if over_heads is None and tokens is None:
    return run(query, key, value, bias, mask, **options)
  over_key_heads = axes.over(axes.heads, key.shape[2])
  over_keys = axes.over(axes.tokens, key.shape[1])

  cut = PartitionSpec(examples, tokens, over_heads, None)
  cut_keys = PartitionSpec(examples, over_keys, over_key_heads, None)
  rng = options.pop('dropout_rng', None)
  arrays = {'query': query, 'key': key, 'value': value, 'rng': rng}
  specs: dict[str, Any] = {'query': cut, 'key': cut_keys, 'value': cut_keys, 'rng': PartitionSpec()}
  for name, x in (('bias', bias), ('mask', mask)):
    arrays[name], specs[name] = _of_scores(x, query.shape, cut)

  def on_device(arrays):
    own = {name: arrays[name] for name in ('key', 'value')}
    if over_heads is not None and over_key_heads is None:
      place = jax.lax.axis_index(over_heads)
      chosen = _key_heads(place, arrays['query'].shape[2], heads // key.shape[2])
      own = {name: jnp.take(x, chosen, axis=2) for name, x in own.items()}
    if over_keys is not None:
      for name, x in own.items():
        own[name] = jax.lax.all_gather(x, over_keys, axis=1, tiled=True)
    rng = arrays['rng']
    if rng is not None:
      drawn = [axis for axis in (examples, over_heads, tokens) if axis is not None]
      rng = jax.random.fold_in(rng, jax.lax.axis_index(drawn))
    return run(
      arrays['query'], **own, bias=arrays['bias'], mask=arrays['mask'], dropout_rng=rng, **options
    )

  if over_keys is not None:
    # Else whole keys and values would be kept, of each layer on each device.
    on_device = jax.checkpoint(on_device)
  spread = jax.shard_map(
    on_device, mesh=axes.mesh, in_specs=(specs,), out_specs=cut, check_vma=False
  )
  return spread(arrays)


def _key_heads(place: jax.Array, heads: int, group: int) -> jax.Array:
  """Which key heads a device takes for its query heads, as few as serve all of them alike.

  Args:
    place: of the device along the axis of heads.
    heads: query heads that it has.
    group: query heads that read the same key head.
  """
  served = math.gcd(heads, group)  # query heads of each key head that is taken
  return (place * heads + served * jnp.arange(heads // served)) // group


def _of_scores(x, query: tuple[int, ...], cut: PartitionSpec):
  """(a bias or mask of scores with all four axes, how it is cut).

  Args:
    x: the bias or mask.
    query: the shape of the queries [B, N, H, K].
    cut: how these are cut.
  """
  if x is None:
    return None, None
  batch, length, heads, _ = query
  examples, tokens, over_heads, _ = cut
  if isinstance(x, TokenMask):
    of_examples = examples if x.shape[0] == batch else None
    where = {
      'places': PartitionSpec(tokens),
      'texts': PartitionSpec(of_examples, tokens),
      'key_texts': PartitionSpec(of_examples),
    }
    return x, dataclasses.replace(x, **where)
  x = jnp.asarray(x)
  x = x.reshape(*[1] * (4 - x.ndim), *x.shape)
  of_examples = examples if x.shape[0] == batch else None
  of_heads = over_heads if x.shape[1] == heads else None
  of_queries = tokens if x.shape[2] == length else None
  return x, PartitionSpec(of_examples, of_heads, of_queries)
