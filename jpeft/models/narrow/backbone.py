"""The weights of a narrow model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import Box, Site, backend_of, join_path
from jpeft.cutting import cut_map

from .keep import Keep
from .plan import Plan, Source, plan_of


def narrowed(model, backbone, keep: Keep) -> tuple[Any, Any]:
  """(a model, its backbone) with some of the layers, heads, hidden units and words of another.

  A scanned model stays scanned if its blocks stay alike. Else the narrow model is unrolled
  (scan=False), and layers are no longer stacked in its backbone.

  Args:
    model: a ViT, Bert, T5, Llama or Gpt of jpeft.models; it is read, never changed.
    backbone: its variables; under jax.eval_shape nothing is computed.
    keep: what stays. Arrays that are not cut are shared with the wide backbone.

  Raises:
    TypeError: another model.
    ValueError: numbers that do not ascend, that there are not, or that leave nothing; kernels in 4
      bits; variables other than params, or of another model.

  Example:
    >>> keep = jpeft.Keep(layers=(0, 2), heads={0: (1,)})  # doctest: +SKIP
    >>> model, variables = jpeft.narrowed(model, variables, keep)  # doctest: +SKIP
  """
  return cut_by(plan_of(model, keep), model, backbone)


def cut_by(plan: Plan, model, backbone) -> tuple[Any, Any]:
  """`narrowed`, by the plan of a narrow model."""
  arrays = backend_of(model).arrays(model, backbone)
  _check_backbone(backbone, arrays, plan.wide.arrays)
  params = {}
  for path, site in plan.narrow.items():
    if site.leaves:
      layers = [_cut(source, site, arrays) for source in plan.sources[path]]
      for name in site.leaves:
        params[join_path(path, name)] = _stacked(site, [layer[name] for layer in layers])
  return plan.model, backend_of(model).replace(plan.model, plan.shapes, params)


def _check_backbone(backbone, arrays: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
  """Raises a ValueError for a backbone that cannot be cut, or that is none of the model."""
  for path in sorted(arrays.keys() ^ shapes.keys()):
    owner = 'backbone' if path in arrays else 'model'
    raise ValueError(f'only the {owner} has {path!r}: are the variables those of this model?')
  for path, array in arrays.items():
    if array.shape != shapes[path].shape:
      raise ValueError(
        f'{path!r} has the shape {array.shape} in the backbone and {shapes[path].shape} in the '
        'model'
      )
    if isinstance(array, Box):
      raise ValueError(
        f'{path!r} is stored as {type(array).__name__}, which cannot be cut: narrow the model, '
        'then quantize it'
      )
  others = sorted(set(backbone) - {'params'})
  if others:
    raise ValueError(
      f'only params are narrowed, and the variables also have {", ".join(others)}: give '
      "{'params': variables['params']}"
    )


def _cut(source: Source, site: Site, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The arrays of one layer of a narrow site, by name."""
  own = {}
  for name in source.site.leaves:
    own[name] = source.site.take(arrays[join_path(source.site.path, name)], source.layer)
  if source.ins is None and source.outs is None:
    return own
  shapes = {name: leaf.shape for name, leaf in site.leaves.items()}
  return cut_map(source.site, own, shapes, source.ins, source.outs)


def _stacked(site: Site, layers: list[jax.Array]) -> jax.Array:
  """An array as a site stores it, of those of its layers."""
  if not site.axes:
    return layers[0]
  return site.stack_restore(jnp.stack(layers).reshape(*site.lengths, *layers[0].shape))
