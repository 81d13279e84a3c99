"""The evaluation of a model on the test split: its scores, and what it writes."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jpeft import tasks
from jpeft.core import Tuned
from jpeft.decoding import AT_ONCE, completions

from . import hosts, report, step
from .asked import TestSplit
from .beginning import Place
from .by_label import write_by_label
from .compiling import compiled_evaluation
from .confusion import write_confusion
from .endings import written_together
from .feature_cache import Part
from .progress import Progress, counted


class Evaluated(NamedTuple):
  """What can be evaluated.

  Attributes:
    tuned: a method on the model, which writes texts.
    part: what of the test split it reads.
    program: compiled for both.
  """

  tuned: Tuned
  part: Part
  program: Callable


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluates.

  Attributes:
    test: what is evaluated, and on what.
    backbone: the arrays beside each theta.
    progress: shows how far it is.
    stop: asked between batches.
  """

  test: TestSplit
  backbone: Any
  progress: Progress
  stop: hosts.Stop

  def scores(
    self, what: Evaluated, theta: Any, number: int, writes: Callable[[dict], bool]
  ) -> dict[str, float] | None:
    """Scores of a model on the test split; None if stopped.

    Args:
      what: the model.
      theta: of it.
      number: of updates made.
      writes: scores -> whether its texts are scored too.
    """
    tally = self._tally(what, theta)
    if tally is None:
      return None
    config = self.test.config
    model = self.test.model
    task = model.task
    tally = task.judged(config, tally, self.test.examples.source)
    if self.test.folder is not None:
      self._write(self.test.folder, number, tally)
    scores = task.scores(tally, tasks.requested(config), model.label_facts)
    if not writes(scores):
      return scores

    def write(prompts, **options) -> Iterator[str]:
      return self._texts(what.tuned, theta, prompts, **options)

    written = task.written(config, model.pretrained, model.sources['test'], write, self.stop)
    if written is None:
      return None
    return scores | written

  def _write(self, folder: pathlib.Path, number: int, tally: dict) -> None:
    """Writes what a tally says of each label, where it does."""
    model = self.test.model
    by_label = model.task.by_label(tally, model.classes, model.label_facts)
    with written_together(folder):
      if 'confusion' in tally:
        write_confusion(folder, number, model.classes, tally['confusion'])
      if by_label:
        write_by_label(folder, number, by_label)

  def _tally(self, what: Evaluated, theta: Any) -> dict | None:
    """The tally of all batches; None if stopped."""
    rows = self.test.rows
    count = self.progress.stage('evaluating', len(what.part.source))
    batches = counted(self.stop.guarded(what.part.once(rows)), rows.size, count)
    return step.evaluate(
      what.program,
      theta,
      self.backbone,
      batches,
      rows,
      self.stop,
      self.test.model.task.kept,
    )

  def _texts(self, tuned: Tuned, theta: Any, prompts, **options) -> Iterator[str]:
    """What a model writes after each prompt, counted by batches."""
    self.progress.stage('writing')  # on a terminal, while the first batch is written
    count = self.progress.stage('writing', len(prompts))
    texts = completions(tuned, self.backbone, prompts, theta=theta, **options)
    for number, text in enumerate(texts, 1):
      if number % AT_ONCE == 0 or number == len(prompts):
        count.show(number)
      yield text


def evaluate_untuned(evaluation: Evaluation, backbone: Any, place: Place) -> None:
  """Logs and tells the scores of the model without its method, where the task wants them.

  Args:
    evaluation: of the run.
    backbone: its shapes, with their shardings.
    place: where the run begins; scores are those of before the first update.
  """
  test = evaluation.test
  if not test.model.task.untuned or place.begun or place.metrics.has(0, 'untuned'):
    return
  untuned = test.model.tuned.only()
  part = test.examples._replace(forward=test.model.layout.forward(untuned, False))
  program = compiled_evaluation(test, backbone, part, {})
  scores = evaluation.scores(Evaluated(untuned, part, program), {}, 0, writes=always)
  if scores is not None:
    with written_together(test.folder):
      place.metrics.add(0, 'untuned', **scores)
    evaluation.progress.note(report.line('untuned', scores))


def always(scores: dict[str, float]) -> bool:
  """That texts are written, whatever the scores are."""
  return True
