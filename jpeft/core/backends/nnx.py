"""NNX: boxed values and a class swap per instance, on a fresh merge: the user's model is never
touched.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Mapping

import jax
from flax import nnx

from ..boxes import Box

RIDER, TAP = 'jpeft', 'jpeft_tap'

_root: contextvars.ContextVar = contextvars.ContextVar('jpeft_root')


class _Rider(nnx.Param):
  """What a module finds beside its arrays. A Param, so that the user's scans slice it like one; it
  lives in the fresh copy alone, where no optimizer looks."""


class _Tap(nnx.Variable):
  """What a rule recorded at a module."""


def _name(path) -> str:
  return '/'.join(map(str, path))


def arrays(model, backbone) -> dict:
  """{'path/name': array or box} of all weights: every Variable but caches, statistics and rngs."""
  kinds = {
    _name(k): v.type if isinstance(v, nnx.VariableMetadata) else type(v)
    for k, v in nnx.to_flat_state(nnx.state(model))
  }
  flat = _flat(backbone)
  if unknown := sorted(set(flat) - set(kinds)):
    raise ValueError(
      f'the backbone of an NNX model is nnx.state(model); this model has no {unknown[0]!r}'
    )
  return {k: v for k, v in flat.items() if _is_weight(kinds[k])}


def _is_weight(kind: type) -> bool:
  return not issubclass(kind, (nnx.RngState, nnx.BatchStat, nnx.Cache, nnx.Intermediate, _Tap))


def _flat(backbone) -> dict:
  return {_name(k): v for k, v in nnx.to_flat_state(nnx.as_pure(backbone))}


def replace(model, backbone, flat: Mapping):
  """The backbone with other arrays; Variables keep their type and metadata."""

  def new(key, old):
    if not isinstance(old, nnx.Variable):
      return flat.get(_name(key), old)
    return old.replace(flat.get(_name(key), old.get_raw_value()))

  return nnx.from_flat_state([(k, new(k, v)) for k, v in nnx.to_flat_state(backbone)])


def shapes_inside(module) -> dict[str, tuple[int, ...]]:
  """The shapes of all arrays in a module, as it sees them inside its call."""
  inside = nnx.to_flat_state(nnx.state(module))
  return {_name(k): tuple(v.get_raw_value().shape) for k, v in inside if _is_weight(type(v))}


def stored(module, name: str):
  """An array that a module owns as it is held: a box stays one."""
  return getattr(module, name).get_raw_value()


def template(module):
  """Nothing: an NNX module cannot be made again at another width."""
  return None


def modules(model) -> list:
  return [module for _, module in nnx.iter_modules(model)]


def fresh(inputs):
  """A cache passed as an argument is written to: work on a copy."""
  return nnx.clone(inputs)


def run(model, backbone, flat, riders, hook, wanted, taps, args, kwargs):
  """A new module with the arrays of `flat` and hook(path, ...) around its calls; see linen.run."""
  root = nnx.merge(*nnx.split(model), copy=True)
  values = _flat(backbone) | dict(flat)
  for path, variable in nnx.iter_graph(root):
    if isinstance(variable, nnx.Variable) and (value := values.get(_name(path))) is not None:
      if isinstance(value, Box):
        variable.set_metadata(on_get_value=_unboxed)
      variable.set_raw_value(value)
  mutable, rngs = kwargs.pop('mutable', False), kwargs.get('rngs')
  method = kwargs.pop('method', '__call__')
  if isinstance(rngs, dict):  # keys by stream name, as Linen takes them
    _reseed(root, kwargs.pop('rngs'))
  for path, module in list(nnx.iter_modules(root)):
    name = _name(path)
    methods = _methods(type(module)) if wanted is None else tuple(m for p, m in wanted if p == name)
    if methods:
      if riders.get(name):
        module.jpeft = _Rider(riders[name])
      module.__class__ = _hooked(type(module), hook, name, methods)
  token = _root.set(root)
  try:
    out = getattr(root, method)(*args, **kwargs)
  finally:
    _root.reset(token)
  return (out, _state(root, mutable, values)) if mutable else out


def _reseed(root, keys: Mapping[str, jax.Array]) -> None:
  """Seeds the model's streams; one that has no key of its own name draws on the dropout key."""
  streams = {v.tag for _, v in nnx.iter_graph(root) if isinstance(v, nnx.RngStream)}
  found = {name: keys.get(name, keys.get('dropout')) for name in streams & {*keys, 'default'}}
  nnx.reseed(root, policy='match_shape', **{n: key for n, key in found.items() if key is not None})


def _methods(cls) -> tuple[str, ...]:
  """The public methods that a user's class defines, and its call."""
  own = [c for c in cls.__mro__ if issubclass(c, nnx.Module) and c is not nnx.Module]
  return tuple(
    dict.fromkeys(
      n
      for c in own
      for n, f in vars(c).items()
      if inspect.isfunction(f) and (n == '__call__' or n[0] != '_')
    )
  )


def _unboxed(_, value):
  return value.unbox() if isinstance(value, Box) else value


def _state(root, wanted, known):
  """What the call wrote: the Variables of a filter, without what rode along."""
  flat = nnx.to_flat_state(nnx.state(root, wanted if wanted is not True else ...))
  return nnx.from_flat_state(
    [(k, v) for k, v in flat if _name(k) in known and not isinstance(v, (nnx.Param, _Tap))]
  )


@functools.lru_cache(maxsize=1024)
def _hooked(cls, hook, path: str, methods: tuple[str, ...]):
  """A subclass whose methods pass through hook; one class for one hook, so jit caches hold."""

  def wrap(method):
    @functools.wraps(getattr(cls, method))
    def wrapped(self, *args, **kwargs):
      rider = self.jpeft.get_value() if hasattr(self, 'jpeft') else {}
      call = functools.partial(getattr(cls, method), self)
      return hook(path, method, self, call, rider, _taps)(*args, **kwargs)

    return wrapped

  body = {method: wrap(method) for method in methods}
  return type(cls.__name__, (cls,), {**body, '__module__': cls.__module__})


def tap(module, name: str, values: Mapping[str, jax.Array]) -> None:
  before = getattr(module, TAP).get_value() if hasattr(module, TAP) else {}
  if name in before:
    raise ValueError(
      f'a {type(module).__name__} is called more than once, so what a tap records '
      'there is ambiguous'
    )
  setattr(module, TAP, _Tap({**before, name: dict(values)}))


def held(module, name: str) -> None:
  """What a rule keeps between calls: nothing, for NNX decoders have no one collection for it."""


def _taps() -> dict[str, dict]:
  graph = nnx.iter_graph(_root.get())
  return {_name(path[:-1]): dict(v.get_value()) for path, v in graph if isinstance(v, _Tap)}


@contextlib.contextmanager
def outside():
  """Modules made by a rule are never hooked in NNX."""
  yield


def pure(module, path: str):
  """(fn, arrays): what the module computes, as a pure function of all that it reads."""
  graphdef, state = nnx.split(module)
  return (
    lambda state, *args, **kwargs: nnx.merge(graphdef, state, copy=True)(*args, **kwargs)
  ), state


def layer(module, site, index: int | None):
  """(fn, arrays, its call): another module of the model `module` is in, one layer of a stack or
  all.
  """
  found = next(m for path, m in nnx.iter_modules(_root.get()) if _name(path) == site.path)
  graphdef, state = nnx.split(found)
  state = jax.tree.map(lambda x: site.each(x) if index is None else site.take(x, index), state)
  fn = lambda state, *args, **kwargs: nnx.merge(graphdef, state, copy=True)(*args, **kwargs)
  return fn, state, type(found).__call__
