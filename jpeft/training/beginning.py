"""Where a run begins or goes on: its arrays, what its folder says, and the first lines it tells."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jpeft import cli, quant, tasks
from jpeft.core import summary
from jpeft.version import __version__

from . import elastic, hosts, report, shared, step
from .asked import Asked
from .checkpoints import fingerprint
from .compiling import Shapes
from .examples import digests, restore_skipped
from .folder import begin
from .imports import imports_of
from .metrics import Metrics
from .stages import Stage, current
from .start import Start, start_of


@dataclasses.dataclass(frozen=True)
class Backbone:
  """The backbone on its devices.

  Attributes:
    arrays: of the model.
    sha256: of all of them; of a narrow one, of what it was cut from, see `narrow.Whole`.
    held: the SHA-256 of what this process holds.
  """

  arrays: Any
  sha256: str
  held: str

  def check_unchanged(self) -> None:
    """Raises a RuntimeError if training has changed it."""
    if hosts.held(self.arrays) != self.held:
      raise RuntimeError('training has changed the backbone')


def placed_backbone(run: Asked, shapes: Shapes) -> Backbone:
  """The backbone of a run on its devices.

  Raises:
    hosts.Everywhere, cli.Mistake: processes have different ones.
  """
  variables = run.model.pretrained.variables
  own = fingerprint(variables)
  sha256 = own if run.model.whole is None else run.model.whole.sha256
  hosts.check_equal(f'the SHA-256 of the backbone {run.config.model.source}', sha256)
  if run.start is not None:
    hosts.check_equal(f'the SHA-256 of {run.config.method.start}', run.start.sha256)
  arrays = hosts.placed(variables, shapes.backbone_sharding)
  return Backbone(arrays, sha256, hosts.held(arrays, own))


def begin_folder(run: Asked, changes: Mapping[str, list], backbone: Backbone) -> list[dict]:
  """Describes a run in its folder, or checks that it is still the same; returns all changes.

  Args:
    run: whose folder.
    changes: what differs from the run that the folder holds, from `claimed`.
    backbone: of the run.
  """
  model = run.model
  reads = tasks.modality_of(model.pretrained).name
  with hosts.together():
    data = digests(run.folder, model.sources, run.config.data.on_error)
  hosts.check_equal('what the splits hold', json.dumps(data))
  with hosts.together():
    return begin(
      run.folder,
      run.config,
      changes,
      run.prepared,
      data=data,
      processes=hosts.count(),
      labels=model.classes,
      facts=model.label_facts,
      reads=reads,
      imports=imports_of(run.config, reads),
      backbone_sha256=backbone.sha256,
      files=model.pretrained.files,
      start_sha256=None if run.start is None else run.start.sha256,
      jpeft=__version__,
    )


class Clock:
  """The seconds of a run, with those before it was stopped."""

  def __init__(self, before: float):
    """Args: before, seconds until the checkpoint that the run goes on from."""
    self._before = before
    self._began = time.perf_counter()

  def seconds(self) -> float:
    """Those until now."""
    return self._before + time.perf_counter() - self._began


@dataclasses.dataclass
class Place:
  """Where a run is.

  Attributes:
    begun: the number of updates with which it went on.
    number: of updates made.
    state: after them.
    stage: of the next update.
    metrics: its log.
    seconds: of the run before it went on.
    start: theta that it starts from; None if there is none.
  """

  begun: int
  number: int
  state: Any
  stage: Stage
  metrics: Metrics
  seconds: float
  start: Start | None


def place_of(
  run: Asked, checkpoints: shared.Checkpoints, backbone: Backbone, tell: Callable[[str], None]
) -> Place:
  """Where a run begins, or was when it stopped.

  Args:
    run: whose batches and skipped examples are brought to the same place.
    checkpoints: of its folder.
    backbone: which theta may start from.
    tell: called with a sentence for each checkpoint that cannot be read.
  """
  number = 0
  seconds = 0.0
  start = run.start
  found = checkpoints.newest(lambda number: current(run.stages, number).shapes, tell)
  if found is None:
    with hosts.together():
      if start is not None and not start.arrays:  # they were left to a checkpoint
        start = start_of(run.config, run.model.tuned, run.folder)
    state = _first_state(run, start, backbone)
  with hosts.together():
    if found is not None:
      number, state, kept = found
      seconds = kept['seconds']
      run.batches.restore(kept['data'])
      restore_skipped(run.examples.skipped, kept.get('skipped', {}))
    stage = current(run.stages, number)
    metrics = Metrics(run.folder / 'metrics.jsonl', number)
  return Place(number, number, state, stage, metrics, seconds, start)


def _first_state(run: Asked, start: Start | None, backbone: Backbone) -> Any:
  """The state before the first update."""
  first = run.stages[0]
  begun = functools.partial(
    step.initial_state,
    first.tuned,
    first.tx,
    seed=run.config.seed,
    start=None if start is None else start.put,
    shardings=first.sharding,
    taught=run.model.taught,
  )
  with cli.inputs_checked():
    return hosts.computed(begun, first.sharding, backbone.arrays)


def first_lines(
  run: Asked, place: Place, shapes: Shapes, products: Any, changes: list[dict]
) -> Iterator[str]:
  """What is told before the first update.

  Args:
    run: what is asked.
    place: where it begins.
    shapes: of its programs.
    products: what was noted of them, from `compile_updates`.
    changes: of the run, from `begin_folder`.
  """
  model = run.model
  yield report.begun(run.config, run.facts, run.steps, place.begun)
  if place.start is not None and place.start.arrays:
    yield place.start.told
  yield report.needs(place.stage.cost)
  for told in model.layout.exceptions():
    yield f'mesh.backbone={run.config.mesh.backbone}: {told}'
  yield from model.layout.token_exceptions()
  kernels = quant.told(model.tuned.sites, products, run.mesh)
  if kernels:
    yield kernels
  forward = run.examples.train.forward
  if isinstance(forward, step.Forward):
    _, why = forward.in_pieces(shapes.batch, model.objective)
    if why:
      yield f'logits are made whole: {why}'
  for later in run.stages:
    if later.begin > place.begun:
      count = summary(later.tuned).trainable
      yield f'after {later.begin} updates: {count:,} trainable numbers'
  if model.whole is not None:
    yield model.whole.told(run.facts.total)
  yield from map(elastic.line, changes)
  yield from run.about
