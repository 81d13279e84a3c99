"""Plans of configurations."""

from collections.abc import Mapping
from typing import Any

from jpeft import config as config_lib
from jpeft import models, tasks, training
from jpeft.methods import preset

from .devices import Target
from .measure import STEPS
from .result import Plan, Plans
from .search import or_instead, planned
from .work import Work

CLASSES = 10  # of a head that the config does not size, which hardly matters


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
  """Outputs of the head of a configuration whose data are not read; 0 for a writer of text."""
  if config.task == 'language':
    return 0
  return config.model.num_classes or CLASSES


def _of_config(name: str, config, where: Target, search: bool) -> Plan:
  pretrained, tuned = training.build(config, classes_of(config), models.describe)
  training.check_used(config, tuned)
  example = tasks.of(config).example(config, pretrained)
  work = Work(
    model=pretrained.model,
    variables=pretrained.variables,
    batch=lambda size: training.batch_shapes(example, size, None),
    size=config.data.batch_size,
    memory=training.Memory.of(config),
    mesh=(config.mesh.data, config.mesh.model),
    sharded=config.mesh.backbone == 'sharded',
    accumulate=config.optimizer.accumulate,
    smoothing=config.loss.label_smoothing,
  )

  def optimizer(tuned):
    return training.optimizer_of(config, tuned, STEPS)[1]

  return planned(work, name, tuned, optimizer, where, search)
