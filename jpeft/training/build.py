"""The tuned model, the method and the optimizer that a configuration names."""

from collections.abc import Callable
from typing import Any

import optax

from jpeft import methods, models, quant, tasks
from jpeft.core import Tuned, attach

from . import optim


def method_of(config):
  """The method that the config names, from the registry.

  Raises:
    ValueError: no such method or hyperparameter, or a value that it does not take.
  """
  values = config.method.to_dict()
  name, head = values.pop('name'), values.pop('head')
  try:
    return methods.make(name, head=head, **values)
  except TypeError as error:
    raise ValueError(f'config.method: {name} does not take {values}: {error}') from error


def optimizer_of(
  config, tuned: Tuned, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """(the learning rate of each of `steps` updates, the update rule) that the config names."""
  rate = optim.schedule(lr=config.optimizer.lr, steps=steps, **config.schedule)
  choices = {k: v for k, v in config.optimizer.items() if k not in ('lr', 'accumulate', 'offload')}
  return rate, optim.optimizer(tuned, tuned.shapes, rate, **choices)


def storage_of(config) -> str | None:
  """The name of the format of the backbone's kernels: what the config says, else the method's own;
  None for none.
  """
  return config.model.quantize or methods.REGISTRY[config.method.name].storage


def build(config, num_classes: int, load: Callable = models.load) -> tuple[Any, Any]:
  """(pretrained, tuned): the backbone, and the method attached to it.

  Args:
    config: of the run.
    num_classes: outputs of a fresh head; 0 for a model that writes text with its own.
    load: `models.load`, or `models.describe` where shapes will do.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with weights, method or patterns.
  """
  method = method_of(config)
  storage = storage_of(config)
  fields = config.model.to_dict() | {
    'num_classes': num_classes or None,
    'seed': config.seed,
    'quantize': storage and quant.named(storage),
  }
  pretrained = load(fields.pop('source'), **fields)
  args, kwargs = tasks.inputs(tasks.of(config).blank(config, pretrained))
  return pretrained, attach(
    pretrained.model, method, pretrained.variables, *args, **kwargs, deterministic=True
  )
