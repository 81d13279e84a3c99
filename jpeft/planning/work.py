"""A model and its batches, as shapes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jpeft import programs, quant, tasks, training
from jpeft.core import Method, Tuned, attach, backend_of, flags_of, stand_in
from jpeft.training import Memory

# Updates of the run whose step is planned: no schedule or stage is longer.
STEPS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Work:
  """A model and its batches, as shapes.

  Attributes:
    model: the module.
    variables: its arrays.
    batch: size -> {name: shape}, as the trainer feeds them.
    size: examples an update.
    memory: what is done to need less memory; `model` and `variables` are already as it says.
    mesh: (data, model) or (data, model, sequence) devices.
    backbone, whole_below: see `training.Layout`.
    accumulate, objective: see `training.train_step`.
    teacher: a moving average of the model that teaches it; None for none.
    momentum: of its updates, see `training.Ema`.
  """

  model: Any
  variables: Any
  batch: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
  size: int
  memory: Memory = dataclasses.field(default_factory=Memory)
  mesh: tuple[int, ...] = (1, 1)
  backbone: str = 'replicated'
  whole_below: int = training.WHOLE_BELOW
  accumulate: int = 1
  objective: tasks.Objective = training.PLAIN
  teacher: tasks.Teacher | None = None
  momentum: Callable[[Any], Any] | None = None

  def mode(self, training: bool) -> dict[str, bool]:
    """The arguments by which the model's call knows whether it trains; empty if it takes none."""
    return flags_of(type(self.model).__call__, training)

  def stored(self, storage: str | None) -> 'Work':
    """The same work on a backbone whose kernels are in a 4-bit format, by name; None: as it is."""
    if storage is None:
      return self
    args, kwargs = tasks.inputs(self.batch(1))

    def coded(variables):
      form = quant.named(storage)
      return quant.quantize(
        self.model,
        form,
        variables,
        *args,
        implementation=self.memory.implementation,
        **kwargs,
        **self.mode(False),
      )

    return dataclasses.replace(
      self,
      variables=jax.eval_shape(coded, self.variables),
      memory=dataclasses.replace(self.memory, storage=storage),
    )

  def tuned(self, method: Method) -> Tuned:
    """The method attached to the model, as it is before a pass over data."""
    args, kwargs = tasks.inputs(self.batch(1))
    method = stand_in(method)
    return attach(self.model, method, self.variables, *args, **kwargs, **self.mode(False))

  def layout(self, tuned: Tuned, mesh: Mesh) -> training.Layout:
    """Where the trainer has the arrays."""
    return training.Layout(tuned, mesh, self.backbone, self.whole_below)

  def placed(self, tuned: Tuned, mesh: Mesh, state, size: int) -> tuple[Any, Any, Any]:
    """(state, variables, batch) as shapes with the shardings that the trainer gives the arrays."""
    layout = self.layout(tuned, mesh)
    offload = training.offloads(mesh, self.memory.offload)
    state = training.with_sharding(state, layout.of_state(state, offload))
    variables = training.with_sharding(self.variables, layout.of_backbone(self.variables))
    batch = self.batch(size)
    batch = training.with_sharding(batch, training.of_batch(mesh, batch))
    return state, variables, batch

  def step(self, tuned: Tuned, tx: optax.GradientTransformation, mesh: Mesh) -> Callable:
    """(state, backbone, batch) -> (state, ...): the trainer's update."""
    layout = self.layout(tuned, mesh)
    teaching = None
    if self.teacher is not None:
      forward = layout.forward(tuned, False, self.mode(False))
      teaching = training.Ema(self.teacher, self.momentum, forward)
    return training.train_step(
      tuned,
      layout.forward(tuned, True, self.mode(True)),
      tx,
      seed=0,
      objective=self.objective,
      accumulate=self.accumulate,
      offload=training.offloads(mesh, self.memory.offload),
      steps=STEPS,
      teaching=teaching,
    )

  def forward(self, size: int) -> float:
    """FLOPs of the untouched model's forward pass."""
    backend = backend_of(self.model)

    def run(variables, batch):
      args, kwargs = tasks.inputs(batch)
      kwargs = kwargs | self.mode(False)
      arrays = backend.arrays(self.model, variables)
      no_hooks = frozenset()
      out, _ = backend.run(self.model, variables, arrays, {}, None, no_hooks, False, args, kwargs)
      return out

    return programs.flops(jax.jit(run).trace(self.variables, self.batch(size))).all
