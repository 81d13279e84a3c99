"""Attention on a mesh of devices, each of which attends for its own examples and heads.

The compiler cuts whole scores by heads, but not a loop over the heads: it would gather queries,
keys and values, and let each device compute all heads.

Axes: B batch, N queries, M keys, H query heads, J key and value heads, K head size.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from .token_mask import TokenMask


@dataclasses.dataclass(frozen=True)
class _Axes:
  """The mesh, and its axes that examples and heads are cut over."""

  mesh: Mesh
  examples: str
  heads: str

  def over(self, axis: str, size: int) -> str | None:
    """The axis, if it divides what is to be cut."""
    return axis if size % self.mesh.shape[axis] == 0 else None


_axes: contextvars.ContextVar[_Axes | None] = contextvars.ContextVar('jpeft_heads', default=None)


@contextlib.contextmanager
def heads_over(mesh: Mesh, examples: str, heads: str) -> Iterator[None]:
  """A context in which the heads of attention in long contexts are cut over an axis of a mesh.

  Args:
    mesh: of all devices that the program runs on.
    examples, heads: axes of the mesh. Heads that do not divide by theirs are not cut.
  """
  token = _axes.set(_Axes(mesh, examples, heads))
  try:
    yield
  finally:
    _axes.reset(token)


def by_devices(run: Callable[..., jax.Array], query, key, value, bias, mask, **options):
  """run(query, key, value, bias, mask, **options), on each device for its examples and heads.

  Args:
    run: an attention function; for the arguments see `dot_product_attention`.
  """
  axes = _axes.get()
  if axes is None or axes.over(axes.heads, key.shape[2]) is None:
    return run(query, key, value, bias, mask, **options)
  batch, _, heads, _ = query.shape
  examples = axes.over(axes.examples, batch)
  cut = PartitionSpec(examples, None, axes.heads, None)
  rng = options.pop('dropout_rng', None)
  arrays = {'query': query, 'key': key, 'value': value, 'rng': rng}
  specs: dict[str, Any] = {'query': cut, 'key': cut, 'value': cut, 'rng': PartitionSpec()}
  for name, x in (('bias', bias), ('mask', mask)):
    arrays[name], specs[name] = _of_scores(x, batch, heads, examples, axes.heads)

  def on_device(arrays):
    rng = arrays.pop('rng')
    if rng is not None:
      drawn = [axis for axis in (examples, axes.heads) if axis is not None]
      rng = jax.random.fold_in(rng, jax.lax.axis_index(drawn))
    return run(**arrays, dropout_rng=rng, **options)

  spread = jax.shard_map(
    on_device, mesh=axes.mesh, in_specs=(specs,), out_specs=cut, check_vma=False
  )
  return spread(arrays)


def _of_scores(x, batch: int, heads: int, examples: str | None, over_heads: str):
  """(a bias or mask of scores with all four axes, how it is cut)."""
  if x is None:
    return None, None
  if isinstance(x, TokenMask):
    of_texts = PartitionSpec(examples if x.shape[0] == batch else None)
    return x, dataclasses.replace(x, places=PartitionSpec(), texts=of_texts, key_texts=of_texts)
  x = jax.numpy.asarray(x)
  x = x.reshape(*[1] * (4 - x.ndim), *x.shape)
  of_examples = examples if x.shape[0] == batch else None
  of_heads = over_heads if x.shape[1] == heads else None
  return x, PartitionSpec(of_examples, of_heads)
