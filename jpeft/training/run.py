"""A run, from a configuration to a report."""

import contextlib
import pathlib
from collections.abc import Sequence

from jpeft import config as config_lib
from jpeft.programs import mib
from jpeft.writing import remove_parts

from . import elastic, hosts, report, shared
from .asked import Asked, asked
from .beginning import (
  Backbone,
  Clock,
  Place,
  begin_folder,
  first_lines,
  place_of,
  placed_backbone,
)
from .compiling import compile_updates, compiled_evaluation, shapes_of
from .endings import written_together
from .evaluating import Evaluated, Evaluation, evaluate_untuned
from .examples import skipped_of
from .feature_cache import Features
from .folder import claimed
from .loop import Loop
from .outcome import outcome
from .preparing import prepared
from .progress import Progress
from .watch import Signals
from .writers import Writers


def train(config, folder: pathlib.Path, allow: Sequence[str] = ()) -> dict:
  """Trains `config` in `folder`, or goes on with it; returns the values of report.json.

  Args:
    config: complete.
    folder: of the run.
    allow: what may differ from the run that `folder` holds, see `elastic.MAY_CHANGE`.

  Raises:
    cli.Mistake: something in config, data or files is wrong.
    cli.Stopped: a signal came; a checkpoint was written.
    cli.Diverged: a loss or gradient is not finite.
  """
  with hosts.ended_together(), contextlib.ExitStack() as stack:
    hosts.check_config(config)
    changes: dict = {}
    done = None
    with hosts.together():
      if hosts.first():
        changes = stack.enter_context(claimed(folder, config, allow))
        remove_parts(folder)
        if not elastic.is_longer(changes):
          done = report.finished(folder, Progress().note)
    changes, done = hosts.told([changes, done])
    if done is not None:
      return done
    stored = None
    if shared.seen_by_all(folder):
      stored = folder.absolute() / 'checkpoints'
    folder = stack.enter_context(shared.mirrored(folder))
    return _train(config, folder, stored, changes, stack)


def _train(
  config,
  folder: pathlib.Path,
  stored: pathlib.Path | None,
  changes: dict,
  stack: contextlib.ExitStack,
) -> dict:
  progress = Progress(stack.enter_context(shared.console()))
  stack.callback(progress.close)
  skipped = skipped_of(config, progress.note)
  with hosts.together():
    run = asked(config, folder, skipped)
  run = prepared(run, progress)

  # From shapes: an update that cannot fit is refused before anything is put on a device.
  progress.stage('compiling')
  shapes = shapes_of(run)
  products = compile_updates(run, shapes)
  test = run.examples.test
  theta = run.stages[-1].shapes['theta']
  program = compiled_evaluation(run.test, shapes.backbone, test, theta)

  backbone = placed_backbone(run, shapes)
  all_changes = begin_folder(run, changes, backbone)
  checkpoints = shared.Checkpoints(folder / 'checkpoints', config.checkpoint.keep, stored)
  stack.callback(checkpoints.close)
  place = place_of(run, checkpoints, backbone, progress.note)
  for told in first_lines(run, place, shapes, products, all_changes):
    progress.note(told)
  _open_trackers(run, place, progress, stack)

  stop = hosts.Stop(stack.enter_context(Signals()), run.mesh)
  evaluation = Evaluation(run.test, backbone.arrays, progress, stop)
  evaluate_untuned(evaluation, shapes.backbone, place)
  clock = Clock(place.seconds)
  _fill_features(run, backbone, progress, stop)
  evaluated = Evaluated(run.model.tuned, test, program)
  Loop(run, place, backbone, checkpoints, evaluation, evaluated, clock).make_updates()

  backbone.check_unchanged()
  theta = run.model.kept(place.state['theta'])
  shared.save_theta(folder / 'theta.safetensors', theta, step=place.number)
  result = outcome(run, place, backbone, clock, all_changes)
  with written_together(folder):
    if hosts.first():
      missing = report.write_report(folder, result, place.metrics.rows)
      if missing:
        progress.note(missing)
  progress.note(report.line(folder, result['eval']))
  return result


def _open_trackers(
  run: Asked, place: Place, progress: Progress, stack: contextlib.ExitStack
) -> None:
  """Sends what is logged from now on to the trackers, until the stack is closed."""
  with hosts.together():
    writers = Writers(run.trackers, run.folder, place.begun, place.metrics.rows, progress.note)
    stack.callback(writers.close)
  if not place.begun:
    writers.config(config_lib.flatten(run.config))
  place.metrics.copied_to(writers)


def _fill_features(run: Asked, backbone: Backbone, progress: Progress, stop: hosts.Stop) -> None:
  """Computes the features of the backbone, once an example, where they are cached."""
  sources = [part.source for part in (run.examples.train, run.examples.test)]
  unfilled = [source for source in sources if isinstance(source, Features)]
  if not unfilled:
    return
  examples = sum(map(len, unfilled))
  size = sum(features.nbytes for features in unfilled)
  progress.note(f'features of {examples:,} examples: {mib(size)}')
  filling = progress.stage('features', examples)
  for features in unfilled:
    features.fill(backbone.arrays, run.examples.test_rows, stop, filling.add)
