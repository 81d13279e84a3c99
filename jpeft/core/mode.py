"""Whether a model trains: its train flag decides, else whether a dropout key was given."""

import inspect as python_inspect

import jax

from .backends.choice import backend_of

# The names of train flags, and the value of each in training.
TRAIN_FLAGS = {
  'train': True,
  'training': True,
  'is_training': True,
  'deterministic': False,
  'inference': False,
  'eval': False,
}


def flags_of(fn, training: bool) -> dict[str, bool]:
  """The train flags that a call takes, with their values: {'deterministic': False}, say.

  Args:
    fn: a function or method, such as `type(module).__call__`.
    training: whether the call shall train.

  Returns:
    {name: value} for every parameter of `fn` that TRAIN_FLAGS names; empty where there is none.
  """
  parameters = python_inspect.signature(fn).parameters
  return {name: training == trains for name, trains in TRAIN_FLAGS.items() if name in parameters}


def mode_of(model, args: tuple, kwargs: dict) -> tuple[bool, jax.Array | None]:
  """Whether a call of a model trains, and the random key of its dropout.

  Args:
    model: a Linen or an NNX module.
    args, kwargs: of the call, with `rngs`, `mutable` and `method` among them.

  Returns:
    (training, key). The key is None in evaluation, and in training where none was given.
  """
  rngs = kwargs.get('rngs')
  key = None
  if isinstance(rngs, dict):
    key = rngs.get('dropout')
  kwargs = {name: value for name, value in kwargs.items() if name not in ('rngs', 'mutable')}
  training = _flag(model, args, kwargs)
  if training is None:
    training = key is not None
  if not training:
    key = None
  return training, key


def _flag(model, args, kwargs) -> bool | None:
  """Whether the flag of the call, or else of the model, means training; None without a flag."""
  method = kwargs.pop('method', None) or '__call__'
  if isinstance(method, str):
    method = getattr(type(model), method)
  try:
    given = python_inspect.signature(method).bind(model, *args, **kwargs)
  except (TypeError, ValueError):
    return None
  given.apply_defaults()
  values = {**given.arguments, **given.arguments.get('kwargs', {})}
  for name, trains in TRAIN_FLAGS.items():
    if isinstance(values.get(name), bool):
      return values[name] == trains
  return _field(model)


def _field(model) -> bool | None:
  """Whether a field `deterministic` of some module means training; None without a field."""
  fields = [
    getattr(module, 'deterministic', None) for module in backend_of(model).flagged_modules(model)
  ]
  flags = [flag for flag in fields if isinstance(flag, bool)]
  if not flags:
    return None
  return not all(flags)
