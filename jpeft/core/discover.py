"""Reads the sites of a model off one forward pass, traced on shapes."""

import inspect

import jax
import numpy as np

from . import anatomy, paths
from .backends.choice import backend_of
from .boxes import Box, inject
from .sites import Leaf, Site, Sites, stack_axes
from .trace import Use, uses

_UNSEEN = {
  'kind': '',
  'inputs': {},
  'out': None,
  'fields': (),
  'heads': None,
  'module': None,
  'methods': (),
}
FIELDS = ('dot_general', 'einsum_op', 'conv_general_dilated', 'attention_fn')


def sites_of(model, backbone, /, *args, **kwargs) -> Sites:
  """Every module of the model, found by tracing one forward pass on shapes.

  Args:
    model: a Linen or an NNX module.
    backbone: Linen's variables or `nnx.state(model)`; shapes will do.
    *args: an example input; shapes will do.
    **kwargs: keyword arguments of the forward pass.
  """
  backend = backend_of(model)
  seen: dict[str, dict] = {}
  held = backend.arrays(model, backbone)
  stored = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in held.items()}
  given, tree = jax.tree.flatten((args, kwargs))
  traced = {i: x for i, x in enumerate(given) if _is_array(x)}

  def forward(flat, traced):
    inputs = tree.unflatten([traced.get(i, x) for i, x in enumerate(given)])
    fresh_args, fresh_kwargs = backend.fresh(inputs)
    hook = _recorder(seen, backend)
    return backend.run(model, backbone, flat, {}, hook, None, False, fresh_args, dict(fresh_kwargs))

  found = uses(
    forward, stored, {i: jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in traced.items()}
  )
  owned: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  for key, spec in stored.items():
    path, _, name = key.rpartition('/')
    owned.setdefault(path, {})[name] = spec

  sites = Sites()
  for path in dict.fromkeys([*seen, *owned]):
    axes, own = _stack(path, stored, seen, found), owned.get(path, {})
    leaves = {
      name: _leaf(spec, found.get(paths.join_path(path, name), Use()), axes)
      for name, spec in own.items()
    }
    inside = next(
      (v for k, v in stored.items() if f'{k}/'.startswith(f'{path}/'.lstrip('/'))), None
    )
    facts = {**_UNSEEN, **{k: v for k, v in seen.get(path, {}).items() if k != 'shapes'}}
    site = Site(
      path=path,
      leaves=leaves,
      axes=axes,
      model=sites,
      boxes={},
      **facts,
      lengths=tuple(inside.shape[a] for a in axes) if axes else (),
    )
    for name in own:
      if isinstance(box := held[paths.join_path(path, name)], Box):
        site.boxes[name] = jax.eval_shape(
          lambda box, site=site: jax.tree.map(lambda x: site.take(x, 0), box), box
        )
    sites[path] = site
  sites.anatomy = anatomy.choose(sites)
  return sites


def _is_array(x) -> bool:
  return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def named_arrays(fn, args, kwargs) -> dict:
  """The array arguments of a method call by parameter name, the first one first."""
  try:
    given = inspect.signature(fn).bind(None, *args, **kwargs)
  except (TypeError, ValueError):
    spread = {**{str(i): x for i, x in enumerate(args)}, **kwargs}
  else:
    spread = {}
    for name, value in given.arguments.items():
      kind = given.signature.parameters[name].kind
      if kind is inspect.Parameter.VAR_POSITIONAL:
        value = {str(i): x for i, x in enumerate(value)}
      spread |= value if kind in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD) else {name: value}
  return {n: x for n, x in spread.items() if hasattr(x, 'shape') and hasattr(x, 'dtype')}


def _inputs(fn, args, kwargs) -> dict[str, jax.ShapeDtypeStruct]:
  return {n: _first(x) for n, x in named_arrays(fn, args, kwargs).items()}


def _first(tree) -> jax.ShapeDtypeStruct | None:
  arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, 'shape') and hasattr(x, 'dtype')]
  return jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype) if arrays else None


def _recorder(seen: dict, backend):
  """A hook that writes down what each module is called with, returns, and offers."""

  def hook(path, method, module, call, rider, taps):
    def recorded(*args, **kwargs):
      fields = tuple(f for f in FIELDS if _offers(module, f))
      facts = {
        'kind': type(module).__name__,
        'inputs': _inputs(getattr(type(module), method), args, kwargs),
        'fields': fields,
        'shapes': backend.shapes_inside(module),
      }
      heads = []
      if 'attention_fn' in fields:
        with inject(module, attention_fn=_counting_heads(module.attention_fn, heads)):
          out = call(*args, **kwargs)
      else:
        out = call(*args, **kwargs)
      methods = tuple(dict.fromkeys((*seen.get(path, {}).get('methods', ()), method)))
      if method == '__call__' or path not in seen:
        seen[path] = {
          **facts,
          'out': _first(out),
          'heads': heads[0] if heads else None,
          'module': backend.template(module),
        }
      seen[path]['methods'] = methods
      return out

    return recorded

  return hook


def _offers(module, field: str) -> bool:
  if not hasattr(module, field) or getattr(module, f'{field}_cls', None) is not None:
    return False
  return field != 'conv_general_dilated' or getattr(module, 'feature_group_count', 1) == 1


def _counting_heads(attention, heads: list):
  def counted(query, key, value, *args, **kwargs):
    heads.append(tuple(key.shape[-2:]))
    return attention(query, key, value, *args, **kwargs)

  return counted


def _stack(path: str, stored: dict, seen: dict, found: dict) -> tuple[int, ...]:
  """The axes that scans and vmaps around a module added to the arrays in it.

  A module that was called saw its own slice of them; of one whose arrays are read by others, the
  jaxpr tells the scans.
  """
  shapes = seen.get(path, {}).get('shapes', {})
  if shapes:
    return stack_axes(
      [stored[paths.join_path(path, n)].shape for n in shapes], list(shapes.values())
    )
  own = [use for key, use in found.items() if key.rpartition('/')[0] == path]
  return min((use.scanned for use in own), key=len, default=())


def _leaf(spec: jax.ShapeDtypeStruct, use: Use, axes: tuple[int, ...]) -> Leaf:
  gone = {a % len(spec.shape) for a in axes}
  kept = [i for i in range(len(spec.shape)) if i not in gone]
  index = {axis: i for i, axis in enumerate(kept)}
  local = lambda dims: tuple(index[a] for a in dims if a in index)
  return Leaf(
    tuple(spec.shape[i] for i in kept),
    spec.dtype,
    use.primitive,
    local(use.ins),
    local(use.batch),
    use.offset,
  )
