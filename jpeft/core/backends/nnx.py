"""NNX: boxed values, and a subclass for each hooked module. See protocol.py for each function.

A call runs on a fresh merge of the model, whose modules get the subclasses: the user's model is
never touched.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ..boxes import Box, read
from ..paths import EXTRAS, TAP, key_path

# The merged model of the call that runs.
_root: contextvars.ContextVar = contextvars.ContextVar('jpeft_root')


class _Extras(nnx.Param):
  """Extra variables of a module: theta, a random key.

  A Param, so that the scans of the user's model slice it like one. It exists in the merged copy
  alone, where no optimizer sees it.
  """


class _Tap(nnx.Variable):
  """What rules recorded at a module."""


def arrays(model, backbone) -> dict[str, Any]:
  kinds = {}
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    kinds[key_path(path)] = _kind(variable)
  flat = _flat(backbone)
  unknown = sorted(set(flat) - set(kinds))
  if unknown:
    raise ValueError(
      f'the backbone of an NNX model is nnx.state(model); this model has no {unknown[0]!r}'
    )
  return {path: value for path, value in flat.items() if _is_weight(kinds[path])}


def _kind(variable) -> type:
  """The class of a value, also where a state has a Variable's metadata in its place."""
  if isinstance(variable, nnx.VariableMetadata):
    return variable.type
  return type(variable)


def _is_weight(kind: type) -> bool:
  """Whether values of a class are weights. A plain array that is an attribute is a constant."""
  if not issubclass(kind, nnx.Variable):
    return False
  return not issubclass(
    kind, (nnx.RngState, nnx.BatchStat, nnx.Cache, nnx.Intermediate, _Extras, _Tap)
  )


def _flat(backbone) -> dict[str, Any]:
  """{'path/name': value} of all Variables."""
  return {key_path(path): value for path, value in nnx.to_flat_state(nnx.as_pure(backbone))}


def replace(model, backbone, flat: Mapping):
  replaced = []
  for path, old in nnx.to_flat_state(backbone):
    name = key_path(path)
    if isinstance(old, nnx.Variable):
      new = old.replace(flat.get(name, old.get_raw_value()))
    else:
      new = flat.get(name, old)
    replaced.append((path, new))
  return nnx.from_flat_state(replaced)


def shapes_inside(module) -> dict[str, tuple[int, ...]]:
  shapes = {}
  for path, variable in nnx.to_flat_state(nnx.state(module)):
    if _is_weight(type(variable)):
      shapes[key_path(path)] = tuple(variable.get_raw_value().shape)
  return shapes


def aliases(model) -> dict[str, str]:
  known = {}
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    known[key_path(path)] = variable
  paths = {id(variable): path for path, variable in nnx.iter_graph(model)}
  found = {}
  for path, module in nnx.iter_modules(model):
    for name, value in vars(module).items():
      here = key_path((*path, name))
      if isinstance(value, nnx.Variable) and here not in known:
        found[here] = key_path(paths[id(value)])
  return found


def stored(module, name: str):
  return getattr(module, name).get_raw_value()


def template(module):
  return None


def flagged_modules(model) -> list:
  return [module for _, module in nnx.iter_modules(model)]


def fresh(inputs):
  return nnx.clone(inputs)


def run(model, backbone, flat, extras, hook, wanted, records, args, kwargs):
  values = _flat(backbone) | dict(flat)
  root = _merged_with(model, values)
  _set_values(root, values)
  mutable = kwargs.pop('mutable', False)
  method = kwargs.pop('method', '__call__')
  if isinstance(kwargs.get('rngs'), dict):  # keys by the names of streams, as Linen takes them
    _reseed(root, kwargs.pop('rngs'))
  for path, module in list(nnx.iter_modules(root)):
    name = key_path(path)
    if wanted is None:
      methods = _methods(type(module))
    else:
      methods = tuple(method for path, method in wanted if path == name)
    if not methods:
      continue
    if extras.get(name):
      setattr(module, EXTRAS, _Extras(extras[name]))
    module.__class__ = _hooked(type(module), hook, name, methods)
  token = _root.set(root)
  try:
    out = getattr(root, method)(*args, **kwargs)
    recorded = _recorded() if records else {}
  finally:
    _root.reset(token)
  if mutable:
    out = out, _written(root, mutable, values)
  return out, recorded


def _merged_with(model, values: Mapping[str, Any]):
  """A copy of a model, with other plain arrays as attributes."""
  graphdef, state = nnx.split(model)
  leaves = []
  for path, leaf in nnx.to_flat_state(state):
    if not isinstance(leaf, nnx.Variable | nnx.VariableMetadata):
      leaf = values.get(key_path(path), leaf)
    leaves.append((path, leaf))
  return nnx.merge(graphdef, nnx.from_flat_state(leaves), copy=True)


def _set_values(root, values: Mapping[str, Any]) -> None:
  """Gives the Variables of a model other values; a box is computed when it is read."""
  for path, variable in nnx.iter_graph(root):
    if not isinstance(variable, nnx.Variable):
      continue
    value = values.get(key_path(path))
    if value is None:
      continue
    if isinstance(value, Box):
      variable.set_metadata(on_get_value=lambda _, value: read(value))
    variable.set_raw_value(value)


def _reseed(root, keys: Mapping[str, jax.Array]) -> None:
  """Seeds the model's streams; the stream 'default' takes the dropout key if it has none."""
  streams = {v.tag for _, v in nnx.iter_graph(root) if isinstance(v, nnx.RngStream)}
  seeds = {}
  for name in streams & {*keys, 'default'}:
    key = keys.get(name, keys.get('dropout'))
    if key is not None:
      seeds[name] = key
  nnx.reseed(root, policy='match_shape', **seeds)


def _methods(cls) -> tuple[str, ...]:
  """The public methods that a user's class and its bases define, and `__call__`."""
  names = []
  for base in cls.__mro__:
    if not issubclass(base, nnx.Module) or base is nnx.Module:
      continue
    for name, value in vars(base).items():
      if inspect.isfunction(value) and (name == '__call__' or name[0] != '_'):
        names.append(name)
  return tuple(dict.fromkeys(names))


def _written(root, mutable, known: Mapping[str, Any]):
  """The state of the Variables that a filter selects, without weights and what jpeft added."""
  if mutable is True:
    mutable = ...
  kept = []
  for path, variable in nnx.to_flat_state(nnx.state(root, mutable)):
    if key_path(path) in known and not isinstance(variable, (nnx.Param, _Tap)):
      kept.append((path, variable))
  return nnx.from_flat_state(kept)


# The same class for the same hook, since nnx.jit and nnx.scan cache what they trace by the class.
@functools.lru_cache(maxsize=1024)
def _hooked(cls, hook, path: str, methods: tuple[str, ...]):
  """A subclass of a module's class whose methods run what `hook` makes of them."""

  def wrap(method):
    @functools.wraps(getattr(cls, method))
    def wrapped(self, *args, **kwargs):
      extras = {}
      if hasattr(self, EXTRAS):
        extras = getattr(self, EXTRAS).get_value()
      call = functools.partial(getattr(cls, method), self)
      return hook(path, method, self, call, extras, _recorded)(*args, **kwargs)

    return wrapped

  body = {method: wrap(method) for method in methods}
  return type(cls.__name__, (cls,), {**body, '__module__': cls.__module__})


def record(module, kind: str, name: str, values: Mapping[str, jax.Array]) -> None:
  recorded = {}
  if hasattr(module, TAP):
    recorded = getattr(module, TAP).get_value()
  of_kind = recorded.get(kind, {})
  if name in of_kind:
    raise ValueError(
      f'a {type(module).__name__} is called more than once, so what a tap records '
      'there is ambiguous'
    )
  setattr(module, TAP, _Tap({**recorded, kind: {**of_kind, name: dict(values)}}))


def _recorded() -> dict[str, dict]:
  """{path: {kind: {rule: {name: array}}}} of the model that runs."""
  found = {}
  for path, variable in nnx.iter_graph(_root.get()):
    if isinstance(variable, _Tap):
      found[key_path(path[:-1])] = dict(variable.get_value())
  return found


def has_cache(module) -> bool:
  for _, part in nnx.iter_modules(module):
    holds = any(isinstance(value, nnx.Cache) for value in vars(part).values())
    if holds and getattr(part, 'decode', None) is not False:
      return True
  return False


def read_cache(module, name: str) -> None:
  return None


def write_cache(module, name: str, values) -> None:
  raise NotImplementedError(
    f'{name}: NNX decoders have no common collection for a cache; read_cache() gives None there, '
    'and nothing is to be written'
  )


@contextlib.contextmanager
def outside():
  # Only modules of the merged model have hooks.
  yield


def pure(module, path: str, method: str = '__call__'):
  graphdef, state = nnx.split(module)
  return _merged(graphdef, method), state


def _merged(graphdef, method: str = '__call__'):
  """fn(state, *args, **kwargs), which calls a method of a module on a copy of its state."""

  def fn(state, *args, **kwargs):
    return getattr(nnx.merge(graphdef, state, copy=True), method)(*args, **kwargs)

  return fn


def layer(module, site, index: int | None):
  modules = nnx.iter_modules(_root.get())
  found = next(other for path, other in modules if key_path(path) == site.path)
  graphdef, state = nnx.split(found)
  if index is None:
    state = jax.tree.map(site.each, state)
  else:
    state = jax.tree.map(lambda x: site.take(x, index), state)
  return _merged(graphdef), state, type(found).__call__
