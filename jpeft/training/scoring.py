"""Scores of a complete run, on its test split or on other examples."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from jpeft import cli, data, tasks
from jpeft import config as config_lib
from jpeft.messages import few, markdown
from jpeft.writing import write

from . import hosts, sharding
from .asked import Model, TestSplit, part_of, test_rows_of
from .by_label import by_label_section
from .compiling import compiled_evaluation
from .confusion import confusion_section
from .evaluating import Evaluated, Evaluation, always
from .examples import count_of, skipped_of
from .folder import describe, opened
from .layout import Layout
from .memory import Memory
from .progress import Progress
from .watch import Signals

# What may be given in place of the values of the run; all else is a part of what was trained.
MAY_CHANGE = (
  *('data.name', 'data.test', 'data.dir', 'data.eval_batch_size', 'data.on_error'),
  *('data.in_memory', 'eval.metric', 'eval.also', 'eval.generate', 'eval.answer_tokens'),
  *('eval.no_answer', 'mesh.data', 'mesh.model', 'mesh.sequence', 'mesh.backbone'),
  'mesh.whole_below',
)


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a run scores.

  Attributes:
    name: of the data set.
    split: of it.
    examples: its number of examples, or of rows of texts.
    skipped: how many of them could not be read, and were skipped.
    step: updates that theta has had.
    values: {metric: value}.
  """

  name: str
  split: str
  examples: int
  skipped: int
  step: int
  values: dict[str, float]

  @property
  def about(self) -> str:
    """What was read."""
    told = f'{self.split} of {self.name}, {self.examples:,} examples'
    return f'{told}, {self.skipped:,} of them skipped' if self.skipped else told

  def as_json(self) -> dict[str, Any]:
    """All of it, as a dict for JSON."""
    return dataclasses.asdict(self)


def scored(
  folder: pathlib.Path,
  overrides: Mapping[str, str] = MappingProxyType({}),
  best: bool = False,
  out: pathlib.Path | None = None,
) -> Scores:
  """Scores of a complete run.

  Args:
    folder: of the run.
    overrides: {dotted key: text} of MAY_CHANGE, as on the command line: other examples, other
      metrics, other devices.
    best: theta of the best evaluation rather than of the end.
    out: new or empty folder that gets scores.json, scores.md and, where the task has such,
      confusion.json and labels.json.

  Raises:
    cli.Mistake: something in folder, overrides, data or files is wrong.
    cli.Stopped: a signal came.
  """
  progress = Progress()
  with contextlib.ExitStack() as stack:
    stack.callback(progress.close)
    with cli.inputs_checked():
      if out is not None:
        cli.check_new(out)
      config, info = describe(folder)
      config = config_lib.overridden(config, overrides, MAY_CHANGE)
      skipped = skipped_of(config, progress.note)
      test, theta, step = _opened(folder, config, info, skipped, best)
    if out is not None:
      out.mkdir(parents=True, exist_ok=True)
      test = dataclasses.replace(test, folder=out)
    stop = hosts.Stop(stack.enter_context(Signals()), test.model.layout.mesh)
    values = _values(test, theta, step, progress, stop)
  name, split = config.data.name, config.data.test
  left_out = count_of(skipped, 'test').get('skipped', 0)
  found = Scores(name, split, len(test.examples.source), left_out, step, values)
  if out is not None:
    _write(out, folder, found)
  return found


def _opened(
  folder: pathlib.Path,
  config,
  info: Mapping[str, Any],
  skipped: Mapping[str, data.Skipped],
  best: bool,
) -> tuple[TestSplit, Any, int]:
  """(what is evaluated, theta, the updates that it has had) of a run."""
  mesh = _mesh(config)
  task = tasks.of(config)
  source = _with_labels(config, task.source(config, config.data.test), info['labels'])
  pretrained, tuned, theta, about = opened(folder, best)
  own = task.parts(config, pretrained).names
  if own:
    raise ValueError(
      f'{folder} was trained with {" and ".join(own)}, which config.task={config.task!r} itself '
      'adds and theta does not keep, so that nothing can be scored'
    )
  facts = info.get('facts') or {}
  model = Model(
    task=task,
    sources={'test': source},
    classes=info['labels'],
    label_facts=facts,
    outputs=task.outputs(info['labels']),
    objective=task.objective(config, facts),
    pretrained=pretrained,
    tuned=tuned,
    memory=Memory.of(config),
    layout=Layout(tuned, mesh, config.mesh.backbone, config.mesh.whole_below),
    dropped=(),
  )
  examples = part_of(config, model, skipped, 'test')
  test = TestSplit(config, None, model, examples, test_rows_of(config, mesh))
  return test, theta, about['step']


def _mesh(config) -> Mesh:
  """The devices.

  Raises:
    ValueError: there are not as many as the run had.
  """
  chosen = config.mesh
  try:
    return sharding.mesh(chosen.data, chosen.model, chosen.sequence)
  except ValueError as error:
    fewer = ' '.join(f'--config.mesh.{name}=1' for name in ('data', 'model', 'sequence'))
    raise ValueError(f'{error}; on one device give {fewer}') from error


def _with_labels(config, source: data.Source, labels: Sequence[str]) -> data.Source:
  """Examples whose labels have the numbers that they had in training.

  Raises:
    ValueError: they have labels that the run has not learned.
  """
  found = list(source.classes)
  if found == list(labels):
    return source
  unknown = [name for name in found if name not in labels]
  if unknown or config.task != 'classification':
    raise ValueError(
      f'{config.data.name} has the labels {few(found, 10)}, and the run has learned '
      f'{few(labels, 10)}'
    )
  numbers = [labels.index(name) for name in found]

  def read(row: int) -> dict[str, Any]:
    example = source.read(row)
    label = example['label']
    if label is None or not 0 <= label < len(numbers):
      raise ValueError(f'row {row} has the label {label!r}; there are {len(numbers)} classes')
    return example | {'label': numbers[label]}

  return dataclasses.replace(source, read=read, classes=list(labels), label_of=None)


def _values(
  test: TestSplit, theta: Any, step: int, progress: Progress, stop: hosts.Stop
) -> dict[str, float]:
  """{metric: value} of theta after so many updates."""
  model = test.model
  variables = model.pretrained.variables
  of_backbone = model.layout.of_backbone(variables)
  of_theta = model.layout.of_state({'theta': theta, 'optimizer': ()})['theta']
  program = compiled_evaluation(
    test,
    sharding.with_sharding(variables, of_backbone),
    test.examples,
    sharding.with_sharding(theta, of_theta),
  )
  evaluation = Evaluation(test, hosts.placed(variables, of_backbone), progress, stop)
  evaluated = Evaluated(model.tuned, test.examples, program)
  values = evaluation.scores(evaluated, jax.device_put(theta, of_theta), step, writes=always)
  if values is None:
    raise cli.Stopped(stop.caught)
  return values


def _write(out: pathlib.Path, folder: pathlib.Path, found: Scores) -> None:
  """Writes scores.json and scores.md."""
  told = found.as_json() | {'run': str(folder)}
  write(out / 'scores.json', json.dumps(told, indent=2) + '\n')
  rows = [(name.replace('_', ' '), f'{value:.6g}') for name, value in found.values.items()]
  lines = [f'# {folder.name} on {found.about}', '', markdown(('metric', 'value'), rows)]
  lines += [*confusion_section(out), *by_label_section(out), '']
  write(out / 'scores.md', '\n'.join(lines))
