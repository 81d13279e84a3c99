"""Thetas of a wide model cut for a narrow one, and back."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Site, leaf_paths
from jpeft.cutting import kernel_of
from jpeft.messages import did_you_mean

from .keep import Keep
from .plan import Plan, Source, plan_of


def narrowed_theta(model, keep: Keep, theta: Any, like: Any) -> Any:
  """A theta of a wide model, cut for the narrow one.

  An axis of an entry is cut if it is as long as the inputs, or the outputs, of the linear map it
  adapts: of LoRA the rows of `a`, or the columns of `b`.

  Args:
    model: the wide model.
    keep: what the narrow model keeps of it.
    theta: of a method on the wide model.
    like: theta of the same method on the narrow one, or its shapes (`Tuned.shapes`).

  Raises:
    ValueError: an entry whose axes are not those of a linear map, or that numbers what is cut.
  """
  plan = plan_of(model, keep)
  result = {}
  for name, path, entries, sources in _entries(plan, like):
    site = plan.narrow[path]
    new = {}
    for key, spec in entries.items():
      layers = []
      for source in sources:
        x = _layer(source.site, _entry(theta, name, source.site.path, key), source.layer)
        narrow_shape = _layer_shape(site, spec)
        where = _places(source, site, x.shape, narrow_shape, x.dtype, f'{name}/{path}/{key}')
        layers.append(x[where])
      new[key] = _stacked_theta(site, layers)
    result.setdefault(name, {})[path] = _rebuilt(like[name][path], new)
  return result


def widened_theta(model, keep: Keep, theta: Any, into: Any) -> Any:
  """A theta of a narrow model, put into one of the wide model ("recovery", arXiv 2502.13533).

  Args:
    model: the wide model.
    keep: what the narrow model keeps of it.
    theta: of a method on the narrow model.
    into: theta of the same method on the wide model. Its numbers stay in the cut places: zeros,
      `jax.tree.map(jnp.zeros_like, tuned.init(...))`, leave the kernels of LoRA as they are there.

  Raises:
    ValueError: as `narrowed_theta`.
  """
  plan = plan_of(model, keep)
  result = jax.tree.map(lambda x: x, into)  # dicts of its own
  for name, path, entries, sources in _entries(plan, theta):
    site = plan.narrow[path]
    for index, source in enumerate(sources):
      wide = leaf_paths(_at(result, name, source.site.path))
      for key, entry in entries.items():
        old = _entry(result, name, source.site.path, key)
        x = _layer(site, entry, index)
        whole = _layer(source.site, old, source.layer)
        where = _places(source, site, whole.shape, x.shape, x.dtype, f'{name}/{path}/{key}')
        layer = whole.at[where].set(x)
        if source.site.axes:
          layers = old.reshape(source.site.layers, *whole.shape)
          layer = layers.at[source.layer].set(layer).reshape(old.shape)
        wide[key] = layer
      result[name][source.site.path] = _rebuilt(result[name][source.site.path], wide)
  return result


def _entries(plan: Plan, theta: Any) -> Iterator[tuple[str, str, dict[str, Any], list[Source]]]:
  """(method, path of a narrow site, {path of an entry: array}, sources) of a theta."""
  for name, by_path in theta.items():
    for path, t in by_path.items():
      if path not in plan.sources:
        hint = did_you_mean(path, plan.sources)
        raise ValueError(f'theta[{name!r}] has {path!r}, which the narrow model has not{hint}')
      yield name, path, leaf_paths(t), plan.sources[path]


def _at(theta: Any, name: str, path: str) -> Any:
  if path not in theta.get(name, {}):
    raise ValueError(
      f'the theta of the wide model has no entry {name!r} for {path!r}: are both of one method?'
    )
  return theta[name][path]


def _entry(theta: Any, name: str, path: str, key: str) -> jax.Array:
  """The entry of a theta at a site of the wide model."""
  entries = leaf_paths(_at(theta, name, path))
  if key not in entries:
    raise ValueError(
      f'the theta of the wide model has no {key!r} at {path!r}: are both of one method?'
    )
  return entries[key]


def _layer(site: Site, x: jax.Array, index: int) -> jax.Array:
  """One layer of an entry of theta, whose first axes are those of the stack."""
  if not site.axes:
    return x
  _layer_shape(site, x)
  return x.reshape(site.layers, *x.shape[len(site.axes) :])[index]


def _layer_shape(site: Site, x: Any) -> tuple[int, ...]:
  """The shape of an entry of theta in one layer.

  Raises:
    ValueError: it has not all layers.
  """
  if x.shape[: len(site.axes)] != site.lengths:
    raise ValueError(
      f'theta at {site.path!r} has the shape {x.shape}, and does not begin with all {site.layers} '
      'layers: one for some layers (`layers=`) is not cut'
    )
  return x.shape[len(site.axes) :]


def _stacked_theta(site: Site, layers: list[jax.Array]) -> jax.Array:
  if not site.axes:
    return layers[0]
  return jnp.stack(layers).reshape(*site.lengths, *layers[0].shape)


def _places(
  source: Source, narrow: Site, wide_shape: tuple, shape: tuple, dtype: Any, label: str
) -> tuple:
  """The index of a narrow entry in the wide one.

  Raises:
    ValueError: nothing says which numbers of it stay.
  """
  is_cut = source.ins is not None or source.outs is not None
  if is_cut and not jnp.issubdtype(dtype, jnp.inexact):
    raise ValueError(
      f'theta has {label!r}, which numbers parts of a matrix that is cut: other numbers mean them '
      'in the narrow model'
    )
  if wide_shape == shape:
    return (...,)
  kept = None
  sizes = (0, 0)
  if is_cut:
    _, leaf = kernel_of(source.site)
    if source.ins is not None:
      kept, sizes = source.ins, (leaf.fan_in, len(source.ins))
    else:
      kept, sizes = source.outs, (leaf.fan_out, len(source.outs))
  axes = []
  fits = len(wide_shape) == len(shape)
  for before, after in zip(wide_shape, shape, strict=False):
    if before == after:
      axes.append(np.arange(before))
    else:
      fits = fits and (before, after) == sizes
      axes.append(kept)
  if not fits:
    raise ValueError(
      f'theta has {label!r} of shape {wide_shape} in the wide model and {shape} in the narrow one, '
      f'and no linear map at {narrow.path!r} is cut so: only entries of linear maps are cut'
    )
  return np.ix_(*axes)


def _rebuilt(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """A tree with other leaves, by their paths."""
  paths = list(leaf_paths(tree))
  return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in paths])
