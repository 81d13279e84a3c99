"""What a complete run reports."""

from typing import Any

from jpeft import tasks
from jpeft.quant import nbytes

from . import hosts, shared
from .asked import Asked
from .beginning import Backbone, Clock, Place
from .checkpoints import damaged
from .metrics import values


def outcome(
  run: Asked, place: Place, backbone: Backbone, clock: Clock, changes: list[dict]
) -> dict[str, Any]:
  """The values of report.json.

  Args:
    run: what was asked.
    place: after the last update.
    backbone: that was trained beside.
    clock: of the run.
    changes: of the run, from `begin_folder`.
  """
  config = run.config
  metrics = place.metrics
  best = tasks.best(config.eval.metric, metrics.of('test'))
  result = {
    'method': config.method.name,
    'model': config.model.source,
    'data': config.data.name,
    'trainable': run.facts.trainable,
    'total': run.facts.total,
    'memory': run.facts.memory,
    'mergeable': run.facts.mergeable,
    'eval': values(metrics.of('test')[-1]),
    **{row['split']: values(row) for row in metrics.of('untuned')},
    'best': {'step': best['step'], 'metric': config.eval.metric, 'value': best[config.eval.metric]},
    'storage': run.model.memory.storage,
    'backbone_bytes': nbytes(backbone.arrays),
    'steps': place.number,
    'batch_size': run.examples.train_rows.size,
    'seconds': round(clock.seconds(), 2),
    'step_cost': max((one.cost for one in run.stages), key=_total),
    'processes': hosts.count(),
    'device': f'{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}',
    'backbone_sha256': backbone.sha256,
    'theta_sha256': shared.fingerprint(run.model.kept(place.state['theta'])),
  }
  return result | _seldom(run, changes)


def _total(cost: dict[str, float]) -> float:
  """The bytes that an update needs."""
  return cost.get('total_bytes', 0)


def _seldom(run: Asked, changes: list[dict]) -> dict[str, Any]:
  """What most runs have nothing of."""
  found: dict[str, Any] = {}
  skipped = {role: each.report() for role, each in run.examples.skipped.items() if each}
  if skipped:
    found['skipped'] = skipped
  broken = damaged(run.folder)
  if broken:
    found['damaged_checkpoints'] = broken
  if run.model.whole is not None:
    found['narrow'] = run.model.whole.told(run.facts.total)
  if changes:
    found['changes'] = changes
  return found
