"""The tuned model, the method and the optimizer that a configuration names."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import optax

from jpeft import data, methods, models, quant, tasks
from jpeft.core import Found, Method, Tuned, attach, chain, stand_in, with_found

from . import optim
from .memory import Memory


def method_of(config):
  """The method that the config names, from the registry.

  Raises:
    ValueError: no such method or hyperparameter, or a value that it does not take.
  """
  values = config.method.to_dict()
  name = values.pop('name')
  head = values.pop('head')
  for key in ('start', 'start_head'):  # of training, see `start_of`
    del values[key]
  values['saved_bits'] = Memory.of(config).saved_bits
  try:
    return methods.make(name, head=head, **values)
  except TypeError as error:
    raise ValueError(f'config.method: {name} does not take {values}: {error}') from error


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


def pruned(
  config, pretrained: models.Pretrained, method: Method
) -> tuple[models.Pretrained, Method]:
  """The backbone without the parts that a method leaves out, and the method for it.

  Both are as they were where it leaves none out, or waits for its pass.

  Raises:
    ValueError: the backbone cannot be cut, see `models.narrowed`.
  """
  if not models.prunes(method):
    return pretrained, method
  args, kwargs = tasks.inputs(tasks.of(config).example(config, pretrained))
  try:
    small = models.pruned(
      method, pretrained.model, pretrained.variables, *args, **kwargs, deterministic=True
    )
  except TypeError as error:  # not a model whose sizes jpeft knows
    raise ValueError(f'{method.names[0]}: {error}') from error
  cut = dataclasses.replace(pretrained, model=small.model, variables=small.backbone)
  return cut, small.method


def build(
  config,
  num_classes: int,
  load: Callable = models.load,
  parts: bool = True,
  found: Found | None = None,
) -> tuple[Any, Any]:
  """(pretrained, tuned): the backbone, and the method attached to it.

  Args:
    config: of the run.
    num_classes: outputs of a fresh head; 0 for a model that keeps its own, see `Task.outputs`.
    load: `models.load`, or `models.describe` if shapes are enough.
    parts: whether what the task itself trains is attached too, see `Task.parts`.
    found: what the method found before training; without it a method that needs a pass over
      training examples is attached as it is before, which is enough for shapes alone.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with weights, method or patterns.
  """
  method = method_of(config)
  if found is not None:
    method = with_found(method, found)
  method = stand_in(method)
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
  del fields['kernels']
  fields['implementation'] = memory.implementation
  fields['quantize'] = None
  if memory.storage is not None:
    fields['quantize'] = quant.named(memory.storage)
  pretrained = _with_pixels(load(source, **fields), config.data.pixels)
  pretrained, method = pruned(config, pretrained, method)
  if parts:
    method = chain(method, task.parts(config, pretrained))
  example = task.example(config, pretrained)
  args, kwargs = tasks.inputs(example)
  kwargs = kwargs | tasks.taken(method, example)
  tuned = attach(
    pretrained.model, method, pretrained.variables, *args, **kwargs, deterministic=True
  )
  return pretrained, tuned
