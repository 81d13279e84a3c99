"""The tuned model, the method and the optimizer that a configuration names."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import optax

from jpeft import data, methods, models, quant, tasks
from jpeft.core import (
  Found,
  Method,
  Tuned,
  attach,
  before_storage,
  chain,
  sites_of,
  stand_in,
  unprepared,
  whole_of,
  with_found,
  with_sizes,
)

from . import optim
from .memory import Memory
from .narrow import as_trained, inputs_of


def method_of(config):
  """The method that the config names, from the registry.

  Raises:
    ValueError: no such method or hyperparameter, or a value that it does not take; two ways to need
      less memory that do not go together.
  """
  values = config.method.to_dict()
  name = values.pop('name')
  head = values.pop('head')
  for key in ('start', 'start_head'):  # of training, see `start_of`
    del values[key]
  memory = Memory.of(config)
  values['saved_bits'] = memory.saved_bits
  try:
    method = methods.make(name, head=head, **values)
  except TypeError as error:
    raise ValueError(f'config.method: {name} does not take {values}: {error}') from error
  if memory.mlp_tokens is not None:
    if memory.saved_bits is not None:
      raise ValueError(
        'config.model.mlp_tokens and config.method.saved_bits do not go together: the first '
        'computes again what the second stores; leave one of them out'
      )
    method = chain(method, methods.tiled(memory.mlp_tokens))
  return method


def hyperparameters(config) -> dict[str, Any]:
  """{name: value} of the method section of a config, with the defaults of the method's factory."""
  parameters = inspect.signature(methods.REGISTRY[config.method.name].make).parameters.values()
  defaults = {parameter.name: parameter.default for parameter in parameters}
  return defaults | config.method.to_dict()


def check_used(config, tuned: Tuned) -> None:
  """Raises a ValueError if arrays of theta reach no output: no training would move them."""
  if tuned.unused:
    raise ValueError(
      f'{config.method.name}: {len(tuned.unused)} arrays of theta reach no output of this model '
      f'and could not be trained: {", ".join(tuned.unused[:3])}'
    )


def optimizer_of(
  config, tuned: Tuned, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """(the learning rate of each of `steps` updates, the update rule) that the config names."""
  rate = optim.schedule(lr=config.optimizer.lr, steps=steps, **config.schedule)
  choices = config.optimizer.to_dict()
  for key in ('lr', 'accumulate', 'offload'):  # not of the update rule
    del choices[key]
  return rate, optim.optimizer(tuned, tuned.shapes, rate, **choices)


def _with_pixels(pretrained: models.Pretrained, pixels: str) -> models.Pretrained:
  """The backbone, its images brought to the mean and deviation that `data.pixels` names.

  Raises:
    ValueError: it reads no images.
  """
  if pixels == 'checkpoint':
    return pretrained
  if pretrained.preprocess is None:
    raise ValueError(f'config.data.pixels={pixels!r} is of images, and this model reads texts')
  mean, std = data.PIXELS[pixels]
  preprocess = {**pretrained.preprocess, 'mean': mean, 'std': std}
  return dataclasses.replace(pretrained, preprocess=preprocess)


def attached(config, pretrained: models.Pretrained, method: Method, parts: bool = True) -> Tuned:
  """A method attached to the backbone of a run.

  Args:
    config: of the run.
    pretrained: the backbone.
    method: from `method_of`.
    parts: whether what the task itself trains is attached too, see `Task.parts`.
  """
  task = tasks.of(config)
  if parts:
    method = chain(method, task.parts(config, pretrained))
  example = task.example(config, pretrained)
  args, kwargs = tasks.inputs(example)
  kwargs = kwargs | tasks.taken(method, example)
  return attach(pretrained.model, method, pretrained.variables, *args, **kwargs, deterministic=True)


def _with_sizes(config, pretrained: models.Pretrained, method: Method) -> Method:
  """A method whose passes found as much as they will, where that follows from the model alone."""
  if not any(preparation.sized for preparation in unprepared(method)):
    return method
  args, kwargs = inputs_of(config, pretrained)
  sites = sites_of(pretrained.model, pretrained.variables, *args, **kwargs)
  return with_sizes(method, sites)


def build(
  config,
  num_classes: int,
  load: Callable = models.load,
  parts: bool = True,
  found: Found | None = None,
  sized: bool | None = None,
) -> tuple[Any, Any]:
  """(pretrained, tuned): the backbone, and the method attached to it.

  Args:
    config: of the run.
    num_classes: outputs of a fresh head; 0 for a model that keeps its own, see `Task.outputs`.
    load: `models.load`, or `models.describe` if shapes are enough.
    parts: whether what the task itself trains is attached too, see `Task.parts`.
    found: what the method found before training, of a run that is opened again: a method that is
      trained on a narrow model is then attached to the whole one. Without it a method that needs a
      pass over training examples is attached as it is before, which is enough for shapes alone.
    sized: whether such a method is attached to a backbone cut as far as is known without examples,
      for plans and benchmarks: which parts are cut means nothing. None for where `load` gives
      shapes alone.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with weights, method or patterns.
  """
  method = method_of(config)
  stored_later = before_storage(method)
  if found is not None:
    method = whole_of(with_found(method, found))
  memory = Memory.of(config)
  fields = config.model.to_dict()
  source = fields.pop('source')
  task = tasks.of(config)
  fields['num_classes'] = num_classes or None
  fields['head'] = task.head
  if task.keeps_head and models.has_head(source, task.head, weights=load is models.load):
    fields['num_classes'] = None
  fields['seed'] = config.seed
  fields['remat'] = memory.remat
  for of_the_step in ('kernels', 'mlp_tokens'):
    del fields[of_the_step]
  fields['implementation'] = memory.implementation
  fields['quantize'] = None
  if memory.storage is not None and not stored_later:
    fields['quantize'] = quant.named(memory.storage)
  pretrained = _with_pixels(load(source, **fields), config.data.pixels)
  if sized is None:
    sized = load is not models.load
  if sized:
    method = _with_sizes(config, pretrained, method)
  if sized or found is not None:  # else the pass before training comes first
    pretrained, method, _ = as_trained(config, pretrained, method)
  return pretrained, attached(config, pretrained, stand_in(method), parts)
