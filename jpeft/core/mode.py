"""Whether a model trains: what its call, or the model itself, says."""

import inspect as python_inspect

import jax

from .backends.choice import backend_of

_TRAINS = {
  'train': True,
  'training': True,
  'is_training': True,
  'deterministic': False,
  'inference': False,
  'eval': False,
}


def flags_of(fn, training: bool) -> dict[str, bool]:
  """What a module's call is told about training: {'deterministic': False}, say, by the parameters
  it has.
  """
  parameters = python_inspect.signature(fn).parameters
  return {name: training == trains for name, trains in _TRAINS.items() if name in parameters}


def _mode(model, args, kwargs) -> tuple[bool, jax.Array | None]:
  """(whether dropout is on, the key for it): the model's own flag decides, else whether a key
  came.
  """
  rngs = kwargs.get('rngs')
  key = rngs.get('dropout') if isinstance(rngs, dict) else None
  flag = _flag(model, args, {k: v for k, v in kwargs.items() if k not in ('rngs', 'mutable')})
  training = key is not None if flag is None else flag
  return training, key if training else None


def _flag(model, args, kwargs) -> bool | None:
  """What the call, or else the model, says about training; None when neither says anything."""
  method = kwargs.pop('method', None) or '__call__'
  fn = getattr(type(model), method) if isinstance(method, str) else method
  try:
    given = python_inspect.signature(fn).bind(model, *args, **kwargs)
  except (TypeError, ValueError):
    return None
  given.apply_defaults()
  values = {**given.arguments, **given.arguments.get('kwargs', {})}
  for name, trains in _TRAINS.items():
    if isinstance(values.get(name), bool):
      return values[name] == trains
  flags = {
    m.deterministic for m in _modules(model) if isinstance(getattr(m, 'deterministic', None), bool)
  }
  return None if not flags else not all(flags)


def _modules(model):
  """The root of a Linen model; all modules of an NNX model, whose train() and eval() set them
  all.
  """
  backend = backend_of(model)
  return [model] if not hasattr(backend, 'modules') else backend.modules(model)
