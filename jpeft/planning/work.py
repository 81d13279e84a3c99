"""A model and its batches, as shapes."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jpeft import programs, tasks
from jpeft import quant as formats
from jpeft.core import Method, Tuned, attach, backend_of
from jpeft.models import Remat
from jpeft.quant import quantize
from jpeft.training import laid, of_state, offloads, over_data, over_model, replicated


@dataclasses.dataclass(frozen=True)
class Work:
  """A model and its batches, as shapes.

  Attributes:
    model: the module.
    variables: what it holds.
    batch: size -> {name: shape}, as the trainer feeds them.
    size: examples an update.
    remat: of the model.
    mesh: (data, model) devices.
    sharded: whether the backbone is spread over the model axis.
    accumulate, smoothing: see `step.train_step`.
    offload: whether the optimizer's state lies in host memory.
  """

  model: Any
  variables: Any
  batch: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
  size: int
  remat: Remat = False
  mesh: tuple[int, int] = (1, 1)
  sharded: bool = False
  accumulate: int = 1
  smoothing: float = 0.0
  offload: bool = False

  def mode(self, training: bool) -> dict[str, bool]:
    """The argument by which the model is told whether it trains; none where it takes none."""
    takes = inspect.signature(type(self.model).__call__).parameters
    return next(
      ({name: training == trains} for name, trains in _MODES.items() if name in takes), {}
    )

  def stored(self, storage: str | None) -> 'Work':
    """The same work on a backbone whose kernels are in 4 bits, by the name of the format; None for
    as they are.
    """
    if storage is None:
      return self
    args, kwargs = tasks.inputs(self.batch(1))
    coded = lambda held: quantize(
      self.model, formats.named(storage), held, *args, **kwargs, **self.mode(False)
    )
    return dataclasses.replace(self, variables=jax.eval_shape(coded, self.variables))

  def tuned(self, method: Method) -> Tuned:
    args, kwargs = tasks.inputs(self.batch(1))
    return attach(self.model, method, self.variables, *args, **kwargs, **self.mode(False))

  def placed(self, mesh: Mesh, state, size: int) -> tuple[Any, Any, Any]:
    """(state, variables, batch) as shapes that lie where the trainer puts the arrays."""
    whole = replicated(mesh)
    backbone = over_model(mesh, self.variables) if self.sharded else whole
    state = laid(state, of_state(mesh, state, offloads(mesh, self.offload)))
    return state, laid(self.variables, backbone), laid(self.batch(size), over_data(mesh))

  def forward(self, size: int) -> float:
    """FLOPs of the untouched model's forward pass."""

    def fn(variables, batch):
      args, kwargs = tasks.inputs(batch)
      flat = backend.arrays(self.model, variables)
      return backend.run(
        self.model,
        variables,
        flat,
        {},
        None,
        frozenset(),
        False,
        args,
        {**kwargs, **self.mode(False)},
      )

    backend = backend_of(self.model)
    return programs.flops(jax.jit(fn).trace(self.variables, self.batch(size))).all


_MODES = {'deterministic': False, 'train': True, 'training': True, 'is_training': True}
