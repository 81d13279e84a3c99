"""The training run: what it builds, compiles, stores, resumes and reports."""

from jpeft.messages import markdown
from jpeft.writing import write

from . import optim
from .build import build, check_used, hyperparameters, method_of, optimizer_of
from .checkpoints import Checkpoints, fingerprint, load_theta, save_theta
from .ema import Ema
from .endings import resumable
from .feature_cache import Features, Part, cached
from .fit import compiled, fitting, step_shardings
from .folder import claimed, describe, reopen
from .hosts import first
from .imports import check_imported, imports_of
from .joining import Joining, join, last_words
from .layout import BACKBONES, WHOLE_BELOW, Layout
from .memory import Memory
from .metrics import Metrics, values
from .optim import optimizer, schedule
from .predictions import answers, check_writable, predictions, save_answers
from .progress import Progress
from .report import line, needs, table, write_report
from .run import train
from .scoring import Scores, scored
from .sharding import (
  mesh,
  mesh_of,
  named,
  of_batch,
  offloads,
  over_data,
  replicated,
  with_sharding,
)
from .step import (
  PLAIN,
  Forward,
  batch_shapes,
  eval_step,
  evaluate,
  initial_state,
  means,
  state_shapes,
  train_step,
  zero_sums,
)
from .writers import Opened, Writer, register_writer

__all__ = [
  'BACKBONES',
  'Checkpoints',
  'Ema',
  'Features',
  'Forward',
  'Joining',
  'Layout',
  'Memory',
  'Metrics',
  'Opened',
  'PLAIN',
  'Part',
  'Progress',
  'Scores',
  'WHOLE_BELOW',
  'Writer',
  'answers',
  'batch_shapes',
  'build',
  'cached',
  'check_imported',
  'check_used',
  'check_writable',
  'claimed',
  'compiled',
  'describe',
  'eval_step',
  'evaluate',
  'fingerprint',
  'first',
  'fitting',
  'hyperparameters',
  'imports_of',
  'initial_state',
  'join',
  'last_words',
  'line',
  'load_theta',
  'markdown',
  'means',
  'mesh',
  'mesh_of',
  'method_of',
  'named',
  'needs',
  'of_batch',
  'offloads',
  'optim',
  'optimizer',
  'optimizer_of',
  'over_data',
  'predictions',
  'register_writer',
  'replicated',
  'reopen',
  'resumable',
  'save_answers',
  'save_theta',
  'schedule',
  'scored',
  'state_shapes',
  'step_shardings',
  'table',
  'train',
  'train_step',
  'values',
  'with_sharding',
  'write',
  'write_report',
  'zero_sums',
]
