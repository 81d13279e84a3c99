"""What a run learns, by the name that the config gives it: labels of images and texts, or texts to
write.
"""

from .classification import CLASSIFICATION
from .language import LANGUAGE
from .task import Task, best, better, inputs, loss

TASKS: dict[str, Task] = {'classification': CLASSIFICATION, 'language': LANGUAGE}


def of(config) -> Task:
  """The task of a configuration."""
  return TASKS[config.task]


from .classification import transform

__all__ = [
  'CLASSIFICATION',
  'LANGUAGE',
  'Task',
  'best',
  'better',
  'inputs',
  'loss',
  'of',
  'transform',
]
