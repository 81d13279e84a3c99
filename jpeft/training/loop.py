"""The loop of a run: evaluate, save, and make one more update."""

import contextlib
import dataclasses
import functools

from jpeft import cli, tasks

from . import hosts, report, sharding, shared, step
from .asked import Asked
from .beginning import Backbone, Clock, Place
from .endings import saved_first, written_together
from .evaluating import Evaluated, Evaluation
from .examples import count_of
from .progress import Progress
from .stages import current, entered
from .watch import Watch


@dataclasses.dataclass
class Loop:
  """Makes the updates of a run.

  Attributes:
    run: what is asked.
    place: where it is; each update moves it on.
    backbone: beside theta.
    checkpoints: written on the way and at the end.
    evaluation: of the run.
    evaluated: the tuned model.
    clock: of the run.
  """

  run: Asked
  place: Place
  backbone: Backbone
  checkpoints: shared.Checkpoints
  evaluation: Evaluation
  evaluated: Evaluated
  clock: Clock

  def __post_init__(self):
    run = self.run
    self._watch = Watch(run.config.data.train, self.checkpoints)
    self._updates = self._progress.stage('update', run.steps, self.place.begun)
    self._evaluate_every = run.config.eval.every or run.batches.steps_per_epoch

  def make_updates(self) -> None:
    """Makes updates until all are made, evaluations get no better, or a signal asks for an end.

    Raises:
      cli.Stopped: a signal came; a checkpoint was written.
      cli.Diverged: a loss or gradient is not finite.
      cli.Mistake: an example cannot be read; a checkpoint was written.
    """
    place = self.place
    stop = self.evaluation.stop
    with hosts.together():
      if place.begun < self.run.steps:
        self.run.batches.check(0)
    while True:
      if place.number + 2 <= self.run.steps:
        stop.look_ahead(functools.partial(self.run.batches.check, 1))
      evaluates = self._is_due(self._evaluate_every)
      saves = self._is_due(self.run.config.checkpoint.every)
      # A state that is not finite is neither evaluated nor saved.
      if stop() or evaluates or saves:
        self._watch.check()
      if evaluates and not place.metrics.has(place.number, 'test'):
        self._evaluate()
      if stop.caught or self._is_last():
        break
      if saves and place.number > place.begun:
        self._save()
      self._update()
    self._save()
    self.checkpoints.wait()
    with self._reading():
      stop.raise_failure()
    self._tell_end()

  @property
  def _progress(self) -> Progress:
    return self.evaluation.progress

  def _is_due(self, every: int) -> bool:
    number = self.place.number
    return number == self.run.steps or (number > 0 and number % every == 0)

  def _is_last(self, *newest: dict[str, float]) -> bool:
    """Whether no update follows: all are made, or evaluations have got no better for too long.

    Args:
      newest: scores of an evaluation that is not yet in metrics.jsonl.
    """
    if self.place.number == self.run.steps:
      return True
    chosen = self.run.config.eval
    if chosen.patience is None:
      return False
    scored = [*self.place.metrics.of('test'), *newest]
    return tasks.stale(chosen.metric, scored) >= chosen.patience

  def _reading(self) -> contextlib.AbstractContextManager[None]:
    """Where examples are read: a broken one ends the run after a checkpoint."""
    store = self._watch.check, self._save, self.checkpoints.wait
    skips = bool(self.run.examples.skipped) or hosts.several()
    return saved_first(self.run.folder, *store, skips=skips)

  def _evaluate(self) -> None:
    """Logs the scores of now, and keeps the best theta."""
    place = self.place
    theta = place.state['theta']
    with self._reading():
      scores = self.evaluation.scores(self.evaluated, theta, place.number, writes=self._is_last)
    if scores is None:
      return
    if tasks.better(self.run.config.eval.metric, scores, place.metrics.of('test')):
      best = self.run.folder / 'best.safetensors'
      shared.save_theta(best, self.run.model.kept(theta), step=place.number, **scores)
    skipped = count_of(self.run.examples.skipped, 'test')
    with written_together(self.run.folder):
      place.metrics.add(place.number, 'test', **scores, **skipped)
    self._progress.note(report.line(f'step {place.number}', scores))

  def _save(self) -> None:
    """Begins to write a checkpoint."""
    about = {'data': self.run.batches.state(), 'seconds': self.clock.seconds()}
    about['skipped'] = {role: found.state() for role, found in self.run.examples.skipped.items()}
    self.checkpoints.save(self.place.number, self.place.state, about)

  def _update(self) -> None:
    """Makes one update."""
    run = self.run
    place = self.place
    with self._reading(), cli.inputs_checked():
      batch = next(run.batches)
    indices = batch.pop('index')
    rows = run.examples.train_rows.put(batch)
    place.state, out = place.stage.update(place.state, self.backbone.arrays, rows)
    place.number += 1
    self._watch.add(place.number, indices, out)
    following = current(run.stages, place.number)
    if following is not place.stage:
      place.stage = following
      place.state = entered(following, place.state)
    if place.number % run.config.log.every == 0 or place.number == run.steps:
      self._watch.check()
      self._log(float(out['grad_norm']))
    self._updates.show(place.number, loss=self._watch.loss)

  def _log(self, grad_norm: float) -> None:
    """Logs the sums of the updates since the last line, which begin again."""
    place = self.place
    found = step.means(place.state['sums'], self.run.model.objective)
    with written_together(self.run.folder):
      place.metrics.add(
        place.number,
        'train',
        **found,
        lr=float(place.stage.rate(place.number - 1)),
        grad_norm=grad_norm,
        **count_of(self.run.examples.skipped, 'train'),
      )
    place.state['sums'] = hosts.placed(step.zero_sums(), sharding.replicated(self.run.mesh))

  def _tell_end(self) -> None:
    """Tells why there are no further updates.

    Raises:
      cli.Stopped: a signal came.
    """
    number, steps = self.place.number, self.run.steps
    if not self._is_last() or not self.place.metrics.has(number, 'test'):
      raise cli.Stopped(
        self.evaluation.stop.caught,
        f'checkpoint {number} of {steps} is in {self.run.folder}; the same command goes on',
      )
    if number < steps:
      chosen = self.run.config.eval
      self._progress.note(
        f'no better {chosen.metric} in {chosen.patience} evaluations: ended after {number} of '
        f'{steps} updates'
      )
