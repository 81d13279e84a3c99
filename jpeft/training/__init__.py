"""The training run: what is built, compiled, kept, resumed and reported."""

from .build import build, method_of, optimizer_of, storage_of
from .checkpoints import Checkpoints, fingerprint, load_theta, save_theta, write
from .feature_cache import Features, Part, cached
from .fit import compiled, fitting
from .folder import claimed, describe, reopen
from .loop import train
from .optim import optimizer, schedule
from .report import Metrics, Progress, asks, line, markdown, table, values, write_report
from .sharding import laid, mesh, of_state, offloads, over_data, over_model, replicated
from .step import (
  eval_step,
  evaluate,
  forward,
  initial_state,
  means,
  no_sums,
  rows_of,
  state_shapes,
  train_step,
)

__all__ = [
  'Checkpoints',
  'Features',
  'Metrics',
  'Part',
  'Progress',
  'asks',
  'build',
  'cached',
  'claimed',
  'compiled',
  'describe',
  'eval_step',
  'evaluate',
  'fingerprint',
  'fitting',
  'forward',
  'initial_state',
  'laid',
  'line',
  'load_theta',
  'markdown',
  'means',
  'mesh',
  'method_of',
  'no_sums',
  'of_state',
  'offloads',
  'optimizer',
  'optimizer_of',
  'over_data',
  'over_model',
  'reopen',
  'replicated',
  'rows_of',
  'save_theta',
  'schedule',
  'state_shapes',
  'storage_of',
  'table',
  'train',
  'train_step',
  'values',
  'write',
  'write_report',
]
