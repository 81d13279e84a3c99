"""What a configuration asks for: data, backbone, method and optimizer. Nothing is compiled yet."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jpeft import data, tasks
from jpeft.core import Tuned, summary, unprepared

from . import elastic, feature_cache, hosts, sharding
from .build import build, check_used, method_of, optimizer_of
from .ema import Ema
from .feature_cache import Part
from .found import Prepared
from .layout import Layout
from .memory import Memory
from .narrow import Whole
from .stages import Stage, stages_of
from .start import Start, start_of
from .writers import check_trackers, trackers_of


@dataclasses.dataclass(frozen=True)
class Model:
  """What a run learns, and by what.

  Attributes:
    task: what is learned.
    sources: {'train' or 'test': the split as the task finds it}; 'test' alone of a complete run.
    classes: the labels, by their numbers.
    label_facts: what the task finds out about the labels of the training split.
    outputs: of a fresh head, see `Task.outputs`.
    objective: the loss.
    pretrained: the backbone, with what belongs to it.
    tuned: the method attached to it.
    memory: what the config says of it.
    layout: where arrays are.
    dropped: names in theta of what the task itself trains, see `Task.parts`.
    whole: what `pretrained` was cut from, where theta goes back to it; else None.
  """

  task: tasks.Task
  sources: Mapping[str, Any]
  classes: Any
  label_facts: Any
  outputs: int
  objective: tasks.Objective
  pretrained: Any
  tuned: Tuned
  memory: Memory
  layout: Layout
  dropped: tuple[str, ...]
  whole: Whole | None = None

  @property
  def taught(self) -> bool:
    """Whether a moving average of the model teaches it."""
    return self.task.teacher is not None

  def teaching(self, config, tuned: Tuned, steps: int) -> Ema | None:
    """How it is taught in a stage of a run of so many updates; None where it is not."""
    teacher = self.task.teacher
    if teacher is None:
      return None
    return Ema(teacher, teacher.momentum(config, steps), self.layout.forward(tuned, False))

  def kept(self, theta: Any) -> Any:
    """What is stored of theta: all but what the task itself trains, for the whole backbone."""
    own = {name: entries for name, entries in theta.items() if name not in self.dropped}
    return own if self.whole is None else self.whole.widened(own)


@dataclasses.dataclass(frozen=True)
class Examples:
  """What the programs of a run read.

  Attributes:
    train, test: the splits for the tuned model: examples, or features of them.
    raw_test: examples, which the untuned model reads.
    train_rows, test_rows: of batches.
    skipped: {'train' or 'test': its skipped examples}; empty where none is to be skipped.
  """

  train: Part
  test: Part
  raw_test: Part
  train_rows: hosts.Rows
  test_rows: hosts.Rows
  skipped: Mapping[str, data.Skipped]


@dataclasses.dataclass(frozen=True)
class TestSplit:
  """What a model is evaluated on.

  Attributes:
    config: complete.
    folder: that files on labels are written to; None for no files.
    model: what is evaluated.
    examples: the split as the model without a method reads it.
    rows: of batches.
  """

  config: Any
  folder: pathlib.Path | None
  model: Model
  examples: Part
  rows: hosts.Rows


@dataclasses.dataclass(frozen=True)
class Asked:
  """A run before its first program is compiled.

  Attributes:
    config: complete.
    folder: of the run.
    trackers: that the log goes to, in process 0.
    model: what is learned, and by what.
    examples: what programs read.
    about: what the splits say of themselves, a line each.
    batches: of training, without end.
    steps: updates of the whole run.
    stages: what is trained from which update on.
    facts: the `summary` of the method at the beginning.
    start: theta of another run that this one starts from; None if there is none.
    prepared: what its method found in a pass before training; None if it needs none.
  """

  config: Any
  folder: pathlib.Path
  trackers: Any
  model: Model
  examples: Examples
  about: list[str]
  batches: data.Batches
  steps: int
  stages: list[Stage]
  facts: Any
  start: Start | None
  prepared: Prepared | None

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return self.model.layout.mesh

  @property
  def test(self) -> TestSplit:
    """What it is evaluated on."""
    examples = self.examples
    return TestSplit(self.config, self.folder, self.model, examples.raw_test, examples.test_rows)


def asked(config, folder: pathlib.Path, skipped: Mapping[str, data.Skipped]) -> Asked:
  """What a configuration asks for.

  Args:
    config: complete.
    folder: of the run.
    skipped: takes in examples that cannot be read.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with devices, data, weights or method.
  """
  trackers = trackers_of(config) if hosts.first() else ()
  check_trackers(trackers)
  return asked_of(config, folder, skipped, trackers, _model(config, _mesh(config)))


def asked_of(
  config,
  folder: pathlib.Path,
  skipped: Mapping[str, data.Skipped],
  trackers: Any,
  model: Model,
  found: Prepared | None = None,
) -> Asked:
  """What a configuration asks for, with a model and its method.

  Args:
    config, folder, skipped: see `asked`.
    trackers: that the log goes to.
    model: what is learned. Its method may still wait for a pass over the examples; then nothing is
      read of a theta to start from.
    found: what that pass has found.
  """
  if config.mesh.sequence > 1:
    model.layout.check(model.task.example(config, model.pretrained, model.outputs))
  raw = _raw(config, model, skipped)
  examples = raw
  if model.memory.cached_features:
    train = feature_cache.cached(raw.train, model.tuned)
    test = feature_cache.cached(raw.test, model.tuned)
    examples = dataclasses.replace(raw, train=train, test=test)
  batches = examples.train.shuffled(examples.train_rows, config.seed)
  steps = config.steps or max(1, round(config.epochs * batches.steps_per_epoch))
  elastic.check_length(folder, steps)
  stages = _stages(config, model, steps)
  facts = summary(stages[0].tuned)
  check_used(config, model.tuned)
  start = None
  if found is not None or not unprepared(method_of(config)):
    start = start_of(config, model.tuned, folder)
  return Asked(
    config=config,
    folder=folder,
    trackers=trackers,
    model=model,
    examples=examples,
    about=_about(config, raw),
    batches=batches,
    steps=steps,
    stages=stages,
    facts=facts,
    start=start,
    prepared=found,
  )


def _mesh(config) -> Mesh:
  """The devices, which several processes can share for this run."""
  mesh = sharding.mesh(config.mesh.data, config.mesh.model, config.mesh.sequence)
  hosts.check_mesh(mesh)
  hosts.check_supported(config)
  return mesh


def _model(config, mesh: Mesh) -> Model:
  _check_shots(config)
  task = tasks.of(config)
  sources = {
    'train': _drawn(config, task.source(config, config.data.train)),
    'test': task.source(config, config.data.test),
  }
  label_facts = task.facts(config, sources['train'])
  outputs = task.outputs(sources['train'].classes)
  objective = task.objective(config, label_facts)
  pretrained, tuned = build(config, outputs)
  task.check(config, tuned)
  return Model(
    task=task,
    sources=sources,
    classes=sources['train'].classes,
    label_facts=label_facts,
    outputs=outputs,
    objective=objective,
    pretrained=pretrained,
    tuned=tuned,
    memory=Memory.of(config),
    layout=Layout(tuned, mesh, config.mesh.backbone, config.mesh.whole_below),
    dropped=task.parts(config, pretrained).names,
  )


def _check_shots(config) -> None:
  """Raises a ValueError if examples of each class are asked for where that means nothing."""
  shots = config.data.shots
  seed = config.data.shots_seed
  if shots is None and seed is not None:
    raise ValueError(
      f'config.data.shots_seed={seed} draws data.shots examples of each class: set that too'
    )
  if shots is not None and config.task != 'classification':
    raise ValueError(
      f"config.data.shots={shots} are examples of each class, of config.task='classification', and "
      f'it is {config.task!r}'
    )


def _drawn(config, source: data.Source) -> data.Source:
  """The training split, or some examples of each class of it (`data.shots`).

  Raises:
    ValueError: a class has too few.
  """
  if config.data.shots is None:
    return source
  seed = config.data.shots_seed
  return data.few_shots(source, config.data.shots, config.seed if seed is None else seed)


def _raw(config, model: Model, skipped: Mapping[str, data.Skipped]) -> Examples:
  """The splits as examples."""
  mesh = model.layout.mesh
  train_rows = hosts.Rows(mesh, config.data.batch_size)
  train = part_of(config, model, skipped, 'train')
  test = part_of(config, model, skipped, 'test')
  return Examples(train, test, test, train_rows, test_rows_of(config, mesh), skipped)


def test_rows_of(config, mesh: Mesh) -> hosts.Rows:
  """The rows of a batch of evaluation."""
  return hosts.Rows(mesh, config.data.eval_batch_size or config.data.batch_size)


def part_of(config, model: Model, skipped: Mapping[str, data.Skipped], role: str) -> Part:
  """A split as examples: 'train' as training reads it, 'test' as evaluation does."""
  training = role == 'train'
  source, transform = model.task.rows(
    config, model.pretrained, model.sources[role], training, model.label_facts
  )
  forward = model.layout.forward(model.tuned, training)
  example = model.task.example(config, model.pretrained, model.outputs)
  return Part(source, transform, forward, example, skipped.get(role))


def _about(config, raw: Examples) -> list[str]:
  """What the splits say of themselves."""
  found = []
  for split, part in ((config.data.train, raw.train), (config.data.test, raw.test)):
    told = getattr(part.source, 'about', '')
    if told:
      found.append(f'{split}: {told}')
  return found


def _stages(config, model: Model, steps: int) -> list[Stage]:
  """The stages of a run of so many updates.

  Raises:
    ValueError: there are several, and features are cached.
  """
  stages = stages_of(model.tuned, steps, lambda staged: optimizer_of(config, staged, steps))
  if model.memory.cached_features and len(stages) > 1:
    raise ValueError(
      f'config.data.cache_features: {config.method.name} trains other entries from an update on, '
      'and features are of what is frozen in all of a run; leave it out'
    )
  return stages
