"""What a run learns: labels of images and texts, or texts to write."""

from .classification import CLASSIFICATION, transform
from .language import LANGUAGE
from .metrics import METRICS, Metric, best, better, register_metric, registered_module
from .task import Task, inputs, loss

TASKS: dict[str, Task] = {'classification': CLASSIFICATION, 'language': LANGUAGE}


def of(config) -> Task:
  """The task of a configuration."""
  return TASKS[config.task]


__all__ = [
  'CLASSIFICATION',
  'LANGUAGE',
  'METRICS',
  'Metric',
  'TASKS',
  'Task',
  'best',
  'better',
  'inputs',
  'loss',
  'of',
  'register_metric',
  'registered_module',
  'transform',
]
