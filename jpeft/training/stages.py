"""The stages of a run: what is trained from an update on, its optimizer and its compiled step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jpeft.core import Tuned

from . import ema, hosts, optim


@dataclasses.dataclass
class Stage:
  """What a run does from an update on, until the next stage begins.

  Attributes:
    begin: how many updates were made before it.
    tuned: the method with what is trained in it.
    rate: the learning rate of each update of the run.
    tx: the optimizer of what is trained.
    sharding: where the state's arrays are.
    shapes: of the state's arrays, with their shardings.
    update: the compiled training step.
    cost: what it needs, see `fit.fitting`.
  """

  begin: int
  tuned: Tuned
  rate: optax.Schedule
  tx: optax.GradientTransformation
  sharding: Any = None
  shapes: Any = None
  update: Any = None
  cost: dict[str, float] = dataclasses.field(default_factory=dict)


def stages_of(tuned: Tuned, steps: int, optimizer: Callable) -> list[Stage]:
  """The stages of a run of `steps` updates; one for a method without any of its own.

  Args:
    tuned: from `attach`.
    steps: updates in all.
    optimizer: tuned -> (learning rate, optimizer).
  """
  found = []
  for begin in tuned.stages(steps):
    staged = tuned.at_stage(begin, steps)
    found.append(Stage(begin, staged, *optimizer(staged)))
  return found


def current(stages: Sequence[Stage], number: int) -> Stage:
  """The stage in which `number` updates have been made."""
  return [stage for stage in stages if stage.begin <= number][-1]


def entered(stage: Stage, state: dict) -> dict:
  """The state at the beginning of a stage, from that at the end of the one before."""
  trained, _ = stage.tuned.split(state['theta'])
  optimizer = optim.carried(state['optimizer'], stage.tx, trained)
  # Copied: what is carried on would else be donated with the state before.
  state = state | {'optimizer': jax.tree.map(lambda x: x.copy(), optimizer)}
  if 'teacher' in state:
    state['teacher'] = ema.entered(stage.tuned, state['teacher'], state['theta'])
  return hosts.placed(state, stage.sharding)
