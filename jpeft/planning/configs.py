"""Plans of configurations."""

from collections.abc import Mapping
from typing import Any

from jpeft import config as config_lib
from jpeft import models, tasks, training
from jpeft.methods import preset

from .devices import Target
from .result import Plan, Plans
from .search import or_instead, planned
from .work import STEPS, Work


def of_configs(configs: Mapping[str, Any], where: Target, search: bool = False) -> Plans:
  """The plans of configurations; if none fits, also of methods that might.

  Args:
    configs: {name: configuration}, complete.
    where: the target.
    search: also find the largest batch that fits.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with a config.
  """
  plans = [_of_config(name, config, where, search) for name, config in configs.items()]
  last = list(configs.values())[-1]
  return or_instead(plans, lambda name: _of_config(name, with_method(last, name), where, search))


def with_method(config, name: str):
  """The configuration with another method, at its preset."""
  method, hyperparameters = preset(name)
  values = {}
  for key, value in config_lib.flatten(config).items():
    if not key.startswith('method.'):
      values[key] = value
  values['method.name'] = method
  for key, value in hyperparameters.items():
    values[f'method.{key}'] = value
  return config_lib.complete(config_lib.nest(values))


def classes_of(config) -> int:
  """Outputs of the head of a configuration whose data are not read."""
  task = tasks.of(config)
  count = config.model.num_classes or task.usual  # which hardly matters
  return task.outputs([str(label) for label in range(count)])


def _of_config(name: str, config, where: Target, search: bool) -> Plan:
  task = tasks.of(config)
  outputs = classes_of(config)
  pretrained, tuned = training.build(config, outputs, models.describe)
  training.check_used(config, tuned)
  example = task.example(config, pretrained, outputs)
  work = Work(
    model=pretrained.model,
    variables=pretrained.variables,
    batch=lambda size: training.batch_shapes(example, size, None),
    size=config.data.batch_size,
    memory=training.Memory.of(config),
    mesh=(config.mesh.data, config.mesh.model, config.mesh.sequence),
    backbone=config.mesh.backbone,
    whole_below=config.mesh.whole_below,
    accumulate=config.optimizer.accumulate,
    objective=task.objective(config, tasks.NO_FACTS),
    teacher=task.teacher,
    momentum=task.teacher and task.teacher.momentum(config, STEPS),
  )

  def optimizer(tuned):
    return training.optimizer_of(config, tuned, STEPS)[1]

  return planned(work, name, tuned, optimizer, where, search)
