"""The pass over training examples that a method may need before training, in a run.

What it finds is in prepared.safetensors of the run folder, and its SHA-256 in run.json: a run that
goes on, and every command that opens the run, reads it there. A run that is killed in the pass
makes it again, and finds the same.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jpeft import data, quant, tasks
from jpeft.core import (
  Examples,
  Found,
  Method,
  Pass,
  Preparation,
  beside,
  found_in,
  layers_of,
  named_key,
  resolved,
  unprepared,
  with_found,
)

from . import hosts
from .asked import Asked, asked_of
from .build import attached, method_of
from .feature_cache import Part
from .found import Prepared, kept_in
from .narrow import as_trained, whole_of_run
from .progress import Progress

_STREAM = 'the pass before training'


def prepared(run: Asked, progress: Progress) -> Asked:
  """The run with what its method needs of a pass; one whose method needs none as it is.

  Raises:
    ValueError, FileNotFoundError: the file is not the one that the run was begun with, or the pass
      cannot serve the model or the labels.
  """
  method = method_of(run.config)
  waiting = unprepared(method)
  if not waiting:
    return run
  if run.model.objective.pairs is not None:
    raise ValueError(
      f'{waiting[0].name} {waiting[0].what} in a pass before training, which has no loss of pairs: '
      "config.task='preferences' does not go with it"
    )
  kept = None
  with hosts.together():
    if hosts.first():
      kept = kept_in(run.folder)
  found = _sent(kept)
  if found is None:
    for preparation in waiting:
      method = _passed(run, method, preparation, progress)
    found = found_in(method)
  with hosts.together():
    method = with_found(method_of(run.config), found)
    return _with_method(run, method, Prepared.of(found))


def _sent(found: Found | None) -> dict[str, np.ndarray] | None:
  """What process 0 read, in all processes."""
  layout = None
  if found is not None:
    layout = [[name, str(x.dtype), list(x.shape)] for name, x in found.items()]
  layout = hosts.told(layout)
  if layout is None:
    return None
  if found is None:
    found = {name: np.zeros(shape, dtype) for name, dtype, shape in layout}
  return {name: hosts.sent(np.asarray(found[name])) for name, _, _ in layout}


def _with_method(run: Asked, method: Method, found: Prepared) -> Asked:
  """The same run with another method."""
  model = run.model
  pretrained, method, small = as_trained(run.config, model.pretrained, method)
  tuned = attached(run.config, pretrained, method)
  layout = dataclasses.replace(model.layout, tuned=tuned)
  whole = whole_of_run(run.config, model.pretrained, small, tuned)
  model = dataclasses.replace(model, pretrained=pretrained, tuned=tuned, layout=layout, whole=whole)
  return asked_of(run.config, run.folder, run.examples.skipped, run.trackers, model, found)


# The pass.


def _passed(run: Asked, method: Method, preparation: Preparation, progress: Progress) -> Method:
  """The method with what one of its passes finds."""
  name = preparation.name
  part = _part(run, progress)
  rows = _rows(run, preparation)
  epoch = -(-len(part.source) // rows.size)
  count = epoch if preparation.batches is None else preparation.batches
  if not preparation.again:
    count = min(count, epoch)
  rounds, rest = divmod(count, epoch)
  read = rounds * len(part.source) + rest * rows.size
  progress.note(f'{name} {preparation.what}: a pass over {read:,} training examples')
  shown = progress.stage('preparing', read)
  examples = _examples(part, rows, run.config.seed, count, shown.add)
  where = run.model.layout.of_backbone(run.model.pretrained.variables)
  objective = run.model.objective
  storage = run.model.memory.storage

  def loss(outputs, labels):
    return objective.losses(outputs, labels), objective.weights(labels)

  own = Pass(
    run.model.pretrained.model,
    hosts.placed(run.model.pretrained.variables, where),
    examples,
    loss=loss,
    key=named_key(jax.random.key(run.config.seed), f'{_STREAM} of {name}'),
    layers=layers_of(method, preparation),
    fetch=hosts.fetched,
    beside=beside(method),
    storage=None if storage is None else quant.named(storage),
  )
  with hosts.together():
    found = preparation.find(own)
  progress.note(f'{name} {preparation.told(found)}')
  return resolved(method, preparation, found)


def _part(run: Asked, progress: Progress) -> Part:
  """The training examples as evaluation reads them: nothing is drawn of them."""
  model = run.model
  source, transform = model.task.rows(
    run.config, model.pretrained, model.sources['train'], False, model.label_facts
  )
  skipped = None
  if run.config.data.on_error == 'skip':
    skipped = data.Skipped(run.config.data.train)  # training tells of them
  train = run.examples.train
  return Part(source, transform, train.forward, train.example, skipped)


def _rows(run: Asked, preparation: Preparation) -> hosts.Rows:
  """The rows of a batch: as many as the preparation says, on each device alike."""
  parts = run.mesh.shape['data']
  size = min(preparation.size, max(len(run.model.sources['train']), 1))
  return hosts.Rows(run.mesh, -(-size // parts) * parts)


def _examples(
  part: Part, rows: hosts.Rows, seed: int, count: int, read: Callable[[int], Any]
) -> Iterator[Examples]:
  """The batches of a pass, in an order that the seed fixes; rows that fill up have a mask of 0."""
  batches = data.Batches(
    part.source,
    rows.size,
    part.transform,
    seed,
    epochs=-(-count // -(-len(part.source) // rows.size)),
    drop_remainder=False,
    skipped=part.skipped,
    rows=rows.here,
  )
  for number, batch in enumerate(batches):
    if number == count:
      return
    batch.pop('index')
    placed = rows.put(batch)
    mask = placed.pop('mask')
    args, kwargs = tasks.inputs(placed)
    yield Examples(args, placed['label'], {**kwargs, 'deterministic': True}, mask)
    read(rows.size)
