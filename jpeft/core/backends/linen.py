"""Linen: boxed params and `nn.intercept_methods`. See protocol.py for what each function does.

Extra variables (theta, random keys) and recorded arrays (taps) are stored in the collection
'params', beside the module's own arrays. A layer lifted by nn.scan, nn.remat or nn.vmap lets only
named collections in and out, and 'params' is always among them.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from flax.core import FrozenDict, meta

from ..boxes import Box
from ..paths import EXTRAS, TAP, join_path, key_path, path_keys

# Where a module that runs as a pure function stands in the model; '' for the model itself.
_prefix: contextvars.ContextVar[str] = contextvars.ContextVar('jpeft_prefix', default='')
# The interceptor of the call of the model that runs.
_intercepting: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
  'jpeft_intercepting', default=None
)
_outside: contextvars.ContextVar[bool] = contextvars.ContextVar('jpeft_outside', default=False)


def arrays(model, backbone) -> dict[str, Any]:
  if 'params' not in backbone:
    raise ValueError(
      "the backbone of a Linen model is its variables, a dict with the key 'params'; "
      f'got the keys {sorted(backbone)}'
    )
  return {path: _plain(leaf) for path, leaf in _flat(backbone['params']).items()}


def replace(model, backbone, flat: Mapping):
  before = _flat(backbone['params'])
  nested = {path_keys(path): _with_metadata(before.get(path), new) for path, new in flat.items()}
  replaced = {**backbone, 'params': traverse_util.unflatten_dict(nested)}
  if isinstance(backbone, FrozenDict):
    return FrozenDict(replaced)
  return replaced


def _flat(params: Mapping) -> dict[str, Any]:
  """{'path/name': leaf} of nested params; boxes and metadata are leaves."""
  flat = traverse_util.flatten_dict(dict(params), is_leaf=lambda _, x: not isinstance(x, Mapping))
  return {key_path(keys): leaf for keys, leaf in flat.items()}


def _plain(leaf):
  """A parameter without its metadata (partition names, say); a box stays one."""
  if isinstance(leaf, Box):
    return leaf
  return meta.unbox(leaf)


def _with_metadata(old, new):
  """A new value under the metadata of the parameter that it replaces."""
  if isinstance(old, Box) or isinstance(new, Box) or not isinstance(old, meta.AxisMetadata):
    return new
  return old.replace_boxed(new)


def shapes_inside(module) -> dict[str, tuple[int, ...]]:
  flat = _flat(module.variables.get('params', {}))
  return {
    path: tuple(meta.unbox(leaf).shape) for path, leaf in flat.items() if TAP not in path.split('/')
  }


def aliases(model) -> dict[str, str]:
  return {}


def stored(module, name: str):
  return module.get_variable('params', name)


def template(module):
  return module.clone(parent=None, name=None)


def flagged_modules(model) -> list:
  return [model]


def fresh(inputs):
  return inputs


def run(model, backbone, flat, extras, hook, wanted, records, args, kwargs):
  beside = {join_path(path, EXTRAS): value for path, value in extras.items()}
  variables = replace(model, backbone, {**flat, **beside})
  returned = _collections(kwargs.pop('mutable', False), backbone)
  mutable = list(returned)
  if records and 'params' not in returned:
    mutable.append('params')
  with _intercepted(_interceptor(hook, wanted)):
    if not mutable:
      return model.apply(variables, *args, **kwargs), {}
    out, state = model.apply(variables, *args, mutable=mutable, **kwargs)
  recorded = {}
  _collect('', state.get('params', {}), recorded)
  if returned:
    out = out, {name: state[name] for name in returned if name in state}
  return out, recorded


def _collections(mutable, backbone) -> list[str]:
  """The names of the collections that `mutable`, as `Module.apply` takes it, returns."""
  if mutable is True:
    return [name for name in backbone if name != 'params']
  if mutable is False:
    return []
  if isinstance(mutable, str):
    return [mutable]
  return list(mutable)


@contextlib.contextmanager
def _intercepted(interceptor: Callable) -> Iterator[None]:
  token = _intercepting.set(interceptor)
  try:
    with nn.intercept_methods(interceptor):
      yield
  finally:
    _intercepting.reset(token)


def _interceptor(hook, wanted):
  """An interceptor for `nn.intercept_methods` that calls `hook`."""
  root = []  # the module called first: the model, or the one that `method` names
  running = set()

  def interceptor(call, args, kwargs, context):
    module = context.module
    method = context.method_name
    # nn.scan, nn.remat and the like of a function call it as if it were a method of the module, by
    # a name that the class does not have; the shells that they put around a class have lambdas.
    is_own = hasattr(type(module), method) and method[0] != '<'
    if _outside.get() or method == 'setup' or not is_own:
      return call(*args, **kwargs)
    if not root:
      root.append(module)
    path = join_path(_prefix.get(), *module.path)
    if wanted is not None and (path, method) not in wanted:
      return call(*args, **kwargs)
    # A subclass that calls super().__call__ comes here twice; the rules must act once.
    here = (id(module), method)
    if here in running:
      return call(*args, **kwargs)
    extras = module.get_variable('params', EXTRAS, {})
    recorded = lambda: _recorded(root[0], module)
    running.add(here)
    try:
      return hook(path, method, module, call, extras, recorded)(*args, **kwargs)
    finally:
      running.discard(here)

  return interceptor


def record(module, kind: str, name: str, values: Mapping[str, jax.Array]) -> None:
  recorded = module.get_variable('params', TAP, {})
  of_kind = recorded.get(kind, {})
  if name in of_kind:
    raise ValueError(
      f'{"/".join(module.path)!r} is called more than once, so what a tap records '
      'there is ambiguous'
    )
  if not module.is_mutable_collection('params'):
    raise ValueError(
      f'nothing can be recorded at {"/".join(module.path)!r}: its params are broadcast over a scan'
    )
  module.put_variable('params', TAP, {**recorded, kind: {**of_kind, name: dict(values)}})


def _recorded(root, module) -> dict[str, dict]:
  """{path: {kind: {rule: {name: array}}}} as `module` sees it.

  A lifted region has a scope of its own, so both its root and that of the model are read.
  """
  found = {}
  for scope in (root.scope, module.scope.root):
    params = scope.variables().get('params', {})
    _collect('/'.join(scope.path), params, found)
  return found


def _collect(path: str, tree: Mapping, found: dict) -> None:
  for name, value in tree.items():
    if name == TAP:
      found[path] = dict(value)
    elif isinstance(value, Mapping) and name != EXTRAS:
      _collect(join_path(path, name), value, found)


def has_cache(module) -> bool:
  return module.is_mutable_collection('cache') and bool(module.variables.get('cache'))


def read_cache(module, name: str) -> dict | None:
  if not module.is_mutable_collection('cache'):
    return None
  return module.get_variable('cache', EXTRAS, {}).get(name, {})


def write_cache(module, name: str, values) -> None:
  before = module.get_variable('cache', EXTRAS, {})
  module.put_variable('cache', EXTRAS, {**before, name: values})


@contextlib.contextmanager
def outside():
  token = _outside.set(True)
  try:
    yield
  finally:
    _outside.reset(token)


def pure(module, path: str, method: str = '__call__'):
  unbound, variables = module.unbind()
  return _applied(unbound, path, _dropout_key(module), method), variables


def _applied(unbound, path: str, rngs: dict, method: str = '__call__'):
  """unbound.apply as fn(variables, *args, **kwargs); its calls have their paths in the model.

  It may be traced when the call of the model has ended: a custom_vjp inside of jit is, when a
  gradient is taken of the whole. The rules inside of it act then too.
  """
  interceptor = _intercepting.get()

  def fn(variables, *args, **kwargs):
    token = _prefix.set(path)
    has_ended = interceptor is not None and _intercepting.get() is not interceptor
    try:
      with _intercepted(interceptor) if has_ended else contextlib.nullcontext():
        return unbound.apply(variables, *args, rngs=rngs, method=method, **kwargs)
    finally:
      _prefix.reset(token)

  return fn


def _dropout_key(module) -> dict[str, jax.Array]:
  if not module.has_rng('dropout'):
    return {}
  return {'dropout': module.make_rng('dropout')}


def layer(module, site, index: int | None):
  variables = {}
  for collection, tree in module.scope.root.variables().items():
    for key in site.path.split('/'):
      tree = tree.get(key, {})
    variables[collection] = tree
  is_metadata = lambda leaf: isinstance(leaf, meta.AxisMetadata)
  params = jax.tree.map(_plain, _without_taps(variables['params']), is_leaf=is_metadata)
  rngs = _dropout_key(module)
  if index is None:
    variables['params'] = jax.tree.map(site.each, params)
    rngs = {name: jax.random.split(key, site.layers) for name, key in rngs.items()}
  else:
    variables['params'] = jax.tree.map(lambda x: site.take(x, index), params)

  def fn(arrays, *args, **kwargs):
    variables, rngs = arrays
    return _applied(site.module, site.path, rngs)(variables, *args, **kwargs)

  return fn, (variables, rngs), type(site.module).__call__


def _without_taps(tree: Mapping) -> dict:
  kept = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      value = _without_taps(value)
    if name != TAP:
      kept[name] = value
  return kept
