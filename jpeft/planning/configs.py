"""Plans of configurations."""

from collections.abc import Mapping
from typing import Any

from jpeft import config as config_lib
from jpeft import models, tasks, training
from jpeft.methods import preset

from . import devices as targets
from .result import Plan, Plans
from .search import _or_instead, _planned
from .work import Work

CLASSES = 10  # of a head about which the config says nothing: its size hardly matters


def of_configs(configs: Mapping[str, Any], where: targets.Target, search: bool = False) -> Plans:
  """The plans of configurations; where none fits, also of what might.

  Args:
    configs: {name: configuration}, complete.
    where: the target.
    search: also find the largest batch that fits.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with a config.
  """
  plans = [_of_config(name, config, where, search) for name, config in configs.items()]
  last = list(configs.values())[-1]
  return _or_instead(plans, lambda name: _of_config(name, with_method(last, name), where, search))


def with_method(config, name: str):
  """The configuration with another method, at its preset."""
  values = {
    key: value for key, value in config_lib.flatten(config).items() if key.split('.')[0] != 'method'
  }
  method, hyperparameters = preset(name)
  chosen = {
    'method.name': method,
    **{f'method.{key}': value for key, value in hyperparameters.items()},
  }
  return config_lib.complete(config_lib.nest({**values, **chosen}))


def classes_of(config) -> int:
  """Outputs of the head of a configuration whose data are not read; 0 for a model that writes
  text.
  """
  return 0 if config.task == 'language' else config.model.num_classes or CLASSES


def _of_config(name: str, config, where: targets.Target, search: bool) -> Plan:
  pretrained, tuned = training.build(config, classes_of(config), models.describe)
  blank = tasks.of(config).blank(config, pretrained)
  _, tx = training.optimizer_of(config, tuned, steps=1000)
  work = Work(
    pretrained.model,
    pretrained.variables,
    lambda size: training.rows_of(blank, size, None),
    config.data.batch_size,
    config.model.remat,
    (config.mesh.data, config.mesh.model),
    config.mesh.backbone == 'sharded',
    config.optimizer.accumulate,
    config.loss.label_smoothing,
    config.optimizer.offload,
  )
  return _planned(work, name, tuned, tx, where, search)
