"""Linen: boxed params and nn.intercept_methods.

Whatever rides along (theta, random keys) and whatever comes out (taps) sits in the 'params'
collection beside the module's own arrays: whoever lifted a layer with nn.scan, nn.remat or nn.vmap
let only named collections in and out, and 'params' is always among them.
"""

import contextlib
import contextvars
from collections.abc import Mapping

import flax.linen as nn
import jax
from flax import traverse_util
from flax.core import FrozenDict, meta

from ..boxes import Box
from ..paths import RIDER, TAP, join_path

_prefix: contextvars.ContextVar[str] = contextvars.ContextVar('jpeft_prefix', default='')
_outside: contextvars.ContextVar[bool] = contextvars.ContextVar('jpeft_outside', default=False)


def arrays(model, backbone) -> dict:
  """{'path/name': array or box} of all params."""
  if 'params' not in backbone:
    raise ValueError(
      "the backbone of a Linen model is its variables, a dict with the key 'params'; "
      f'got the keys {sorted(backbone)}'
    )
  flat = traverse_util.flatten_dict(
    dict(backbone['params']), is_leaf=lambda _, x: not isinstance(x, Mapping)
  )
  return {'/'.join(k): v if isinstance(v, Box) else meta.unbox(v) for k, v in flat.items()}


def replace(model, backbone, flat: Mapping) -> dict:
  """The backbone with other params; metadata such as partition names stays where it was."""

  def value(key, new):
    old = before.get(key)
    return (
      old.replace_boxed(new)
      if isinstance(old, meta.AxisMetadata)
      and not isinstance(old, Box)
      and not isinstance(new, Box)
      else new
    )

  before = {
    '/'.join(k): v
    for k, v in traverse_util.flatten_dict(
      dict(backbone['params']), is_leaf=lambda _, x: not isinstance(x, Mapping)
    ).items()
  }
  nested = {tuple(k.split('/')): value(k, v) for k, v in flat.items()}
  new = {**backbone, 'params': traverse_util.unflatten_dict(nested)}
  return FrozenDict(new) if isinstance(backbone, FrozenDict) else new


def shapes_inside(module) -> dict[str, tuple[int, ...]]:
  """The shapes of all arrays in a module, as it sees them inside its call."""
  flat = traverse_util.flatten_dict(
    dict(module.variables.get('params', {})), is_leaf=lambda _, x: not isinstance(x, Mapping)
  )
  return {'/'.join(k): tuple(meta.unbox(v).shape) for k, v in flat.items() if TAP not in k}


def stored(module, name: str):
  """An array that a module owns as it is held: a box stays one."""
  return module.get_variable('params', name)


def template(module):
  """An unbound copy of a module: its class and fields."""
  return module.clone(parent=None, name=None)


def fresh(inputs):
  return inputs


def run(model, backbone, flat, riders, hook, wanted, taps, args, kwargs):
  """model.apply with `flat` as its params and hook(path, module, call, rider, taps) around calls.

  Args:
    model: the module.
    backbone: its variables; collections other than params are passed through.
    flat: {'path/name': array or box} for params.
    riders: {path: pytree} what modules find beside their arrays.
    hook: (path, method, module, call, rider, taps) -> callable.
    wanted: {(path, method)} where to hook; None for every call of every module.
    taps: whether some rule records arrays.
    args, kwargs: of model.apply.
  """
  flat = {**flat, **{join_path(path, RIDER): rider for path, rider in riders.items()}}
  first = []  # the module called first: the root, or the one that `method` names
  running = set()

  def interceptor(call, a, kw, context):
    module, method = context.module, context.method_name
    if (
      _outside.get() or method == 'setup' or method[0] == '<'
    ):  # the shells of lifted classes are lambdas
      return call(*a, **kw)
    if not first:
      first.append(module)
    path = join_path(_prefix.get(), *module.path)
    if wanted is not None and (path, method) not in wanted:
      return call(*a, **kw)
    if (id(module), method) in running:  # a subclass calls super().__call__: one call to the rules
      return call(*a, **kw)
    rider = module.get_variable('params', RIDER, {})
    running.add((id(module), method))
    try:
      return hook(path, method, module, call, rider, lambda: _taps(first[0], module))(*a, **kw)
    finally:
      running.discard((id(module), method))

  kept = _names(kwargs.pop('mutable', False), backbone)
  mutable = [*kept, *(['params'] if taps and 'params' not in kept else [])]
  with nn.intercept_methods(interceptor):
    out = model.apply(replace(model, backbone, flat), *args, mutable=mutable or False, **kwargs)
  if not mutable:
    return out
  out, state = out
  return (out, {name: state[name] for name in kept if name in state}) if kept else out


def _names(mutable, backbone) -> list[str]:
  if isinstance(mutable, bool):
    return [name for name in backbone if name != 'params'] if mutable else []
  return [mutable] if isinstance(mutable, str) else list(mutable)


def tap(module, name: str, values: Mapping[str, jax.Array]) -> None:
  before = module.get_variable('params', TAP, {})
  if name in before:
    raise ValueError(
      f'{"/".join(module.path)!r} is called more than once, so what a tap records '
      'there is ambiguous'
    )
  if not module.is_mutable_collection('params'):
    raise ValueError(
      f'nothing can be recorded at {"/".join(module.path)!r}: its params are broadcast over a scan'
    )
  module.put_variable('params', TAP, {**before, name: dict(values)})


def held(module, name: str) -> dict | None:
  """What a rule keeps in the collection 'cache'; None where that is not mutable."""
  if not module.is_mutable_collection('cache'):
    return None
  return module.get_variable('cache', RIDER, {}).get(name, {})


def hold(module, name: str, values) -> None:
  module.put_variable('cache', RIDER, {**module.get_variable('cache', RIDER, {}), name: values})


def _taps(root, module) -> dict[str, dict]:
  """{path: {rule: {name: array}}}, from the root and from the lifted region that the reader is
  in.
  """
  found = {}
  for scope in (root.scope, module.scope.root):
    tree = scope.variables().get('params', {})
    _collect('/'.join(scope.path), tree, found)
  return found


def _collect(path: str, tree: Mapping, found: dict) -> None:
  for name, value in tree.items():
    if name == TAP:
      found[path] = dict(value)
    elif isinstance(value, Mapping) and name != RIDER:
      _collect(join_path(path, name), value, found)


@contextlib.contextmanager
def outside():
  """Linen modules run here are no part of the model: no rule sees them."""
  token = _outside.set(True)
  try:
    yield
  finally:
    _outside.reset(token)


def _applied(unbound, path: str, rngs: dict):
  def fn(variables, *args, **kwargs):
    token = _prefix.set(path)
    try:
      return unbound.apply(variables, *args, rngs=rngs, **kwargs)
    finally:
      _prefix.reset(token)

  return fn


def _rngs(module) -> dict:
  return {name: module.make_rng(name) for name in ('dropout',) if module.has_rng(name)}


def pure(module, path: str):
  """(fn, arrays): what the module computes, as a pure function of all that it reads."""
  unbound, variables = module.unbind()
  return _applied(unbound, path, _rngs(module)), variables


def layer(module, site, index: int | None):
  """(fn, arrays, its call): another module of the model `module` is in, one layer of a stack or
  all.
  """
  variables = {}
  for name, tree in module.scope.root.variables().items():
    for key in site.path.split('/'):
      tree = tree.get(key, {})
    variables[name] = tree
  is_box = lambda x: isinstance(x, meta.AxisMetadata)
  plain = lambda x: x if isinstance(x, Box) else meta.unbox(x)
  params = jax.tree.map(plain, _without_taps(variables['params']), is_leaf=is_box)
  variables['params'] = jax.tree.map(
    lambda x: site.each(x) if index is None else site.take(x, index), params
  )
  rngs = {
    name: key if index is not None else jax.random.split(key, site.layers)
    for name, key in _rngs(module).items()
  }

  def fn(arrays, *args, **kwargs):
    variables, rngs = arrays
    return _applied(site.module, site.path, rngs)(variables, *args, **kwargs)

  return fn, (variables, rngs), type(site.module).__call__


def _without_taps(tree):
  return {k: _without_taps(v) if isinstance(v, Mapping) else v for k, v in tree.items() if k != TAP}
