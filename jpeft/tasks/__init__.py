"""What a run learns: classes, sets of classes or numbers of images and texts, or texts to write."""

from .classification import CLASSIFICATION
from .dino import DINO, dino
from .language import LANGUAGE
from .losses import Objective, loss, loss_of_teacher, softmax
from .mae import MAE, mae
from .masked import MASKED
from .metrics import (
  METRICS,
  Metric,
  best,
  better,
  register_metric,
  registered_module,
  requested,
  stale,
)
from .modality import (
  Modality,
  inputs,
  length_of,
  modality,
  modality_module,
  modality_of,
  register_modality,
  taken,
)
from .multilabel import MULTILABEL
from .pieces import in_pieces, token_losses
from .preferences import PREFERENCES, Pairs
from .questions import QUESTIONS
from .regression import REGRESSION
from .task import NO_FACTS, Answer, Facts, Task, Teacher
from .teachers import MOST_LOGITS, HeadStates, Taught, head_states
from .tokens import TOKENS

TASKS: dict[str, Task] = {
  'classification': CLASSIFICATION,
  'multilabel': MULTILABEL,
  'regression': REGRESSION,
  'language': LANGUAGE,
  'preferences': PREFERENCES,
  'tokens': TOKENS,
  'questions': QUESTIONS,
  'masked': MASKED,
  'mae': MAE,
  'dino': DINO,
}


def of(config) -> Task:
  """The task of a configuration."""
  return TASKS[config.task]


__all__ = [
  'Answer',
  'CLASSIFICATION',
  'DINO',
  'Facts',
  'HeadStates',
  'LANGUAGE',
  'MAE',
  'METRICS',
  'MOST_LOGITS',
  'MULTILABEL',
  'Metric',
  'Modality',
  'NO_FACTS',
  'Objective',
  'PREFERENCES',
  'Pairs',
  'REGRESSION',
  'TASKS',
  'Task',
  'Taught',
  'Teacher',
  'best',
  'better',
  'dino',
  'head_states',
  'in_pieces',
  'inputs',
  'length_of',
  'loss',
  'loss_of_teacher',
  'mae',
  'modality',
  'modality_module',
  'modality_of',
  'of',
  'register_metric',
  'register_modality',
  'registered_module',
  'requested',
  'softmax',
  'stale',
  'taken',
  'token_losses',
]
