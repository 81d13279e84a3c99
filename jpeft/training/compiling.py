"""The programs of a run, compiled from shapes: what cannot fit is refused before arrays move."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jpeft.core import noting

from . import fit, hosts, sharding, step
from .asked import Asked, TestSplit
from .feature_cache import Part
from .stages import Stage


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What programs are compiled for, beside the state.

  Attributes:
    backbone: its shapes, with their shardings.
    backbone_sharding: these alone.
    batch: shapes of a batch of training.
    offload: whether the optimizer's state is in host memory.
  """

  backbone: Any
  backbone_sharding: Any
  batch: Any
  offload: bool


def shapes_of(run: Asked) -> Shapes:
  """The shapes of backbone and batches on the devices of a run."""
  model = run.model
  examples = run.examples
  offload = sharding.offloads(run.mesh, model.memory.offload)
  where = model.layout.of_backbone(model.pretrained.variables)
  return Shapes(
    backbone=sharding.with_sharding(model.pretrained.variables, where),
    backbone_sharding=where,
    batch=step.batch_shapes(examples.train.example, examples.train_rows.size, run.mesh),
    offload=offload,
  )


def compile_updates(run: Asked, shapes: Shapes) -> list:
  """Compiles the update of each stage; returns what is noted of products in the last one.

  Raises:
    hosts.Everywhere, cli.Mistake: an update does not fit its devices.
  """
  return [_compile(run, stage, shapes) for stage in run.stages][-1]


def _compile(run: Asked, stage: Stage, shapes: Shapes) -> list:
  """Compiles the update of a stage; returns what is noted of its products, see `core.noting`."""
  update = _update(run, stage, shapes)
  layout = run.model.layout
  state = step.state_shapes(stage.tuned, stage.tx, run.model.pretrained.variables, run.model.taught)
  stage.sharding = layout.of_state(state, shapes.offload)
  stage.shapes = sharding.with_sharding(state, stage.sharding)
  with hosts.together(), noting() as products:
    stage.update, stage.cost = fit.fitting(update, stage.shapes, shapes.backbone, shapes.batch)
  return products


def _update(run: Asked, stage: Stage, shapes: Shapes) -> Callable:
  """The update of a stage, not yet compiled."""
  model = run.model
  forward = run.examples.train.forward
  if stage.tuned is not model.tuned:
    forward = model.layout.forward(stage.tuned, True)
  return step.train_step(
    stage.tuned,
    forward,
    stage.tx,
    run.config.seed,
    model.objective,
    run.config.optimizer.accumulate,
    shapes.offload,
    run.steps,
    model.teaching(run.config, stage.tuned, run.steps),
  )


def compiled_evaluation(test: TestSplit, backbone: Any, part: Part, theta: Any) -> Callable:
  """The compiled evaluation of batches.

  Args:
    test: whose batches they are.
    backbone: its shapes, with their shardings.
    part: what is read, and by which forward pass.
    theta: its shapes.
  """
  model = test.model
  example = part.example | {'mask': np.ones(1, np.float32)}
  batch = step.batch_shapes(example, test.rows.size, model.layout.mesh)
  task = model.task
  fn = step.eval_step(part.forward, task.tally, task.tally_losses, model.objective.pairs)
  return fit.compiled(fn, theta, backbone, batch)[0]
