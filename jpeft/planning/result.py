"""The plan of one training step, and plans side by side."""

import dataclasses
from typing import Any

from jpeft import programs
from jpeft.messages import columns
from jpeft.models import Remat

from . import timing
from .advice import advice, time_advice
from .traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one training step of a method needs of one device of a target.

  Attributes:
    method: its name.
    target: see `devices.target`.
    batch: examples an update, over all devices.
    devices: of the mesh.
    remat: what is recomputed in the backward pass, see `models`.
    trainable: numbers that the optimizer sees.
    memory_class: what the backward pass must store of the backbone.
    weights: bytes of the backbone, which is on the device whether or not the step reads it.
    theta: bytes of what is trained.
    optimizer: bytes of the optimizer's state.
    argument: bytes of all that the step is called with.
    temp: bytes it allocates in between; None if it was not compiled.
    total: bytes it needs, at least those of the arguments.
    exact: False if `total` is that lower bound alone.
    limit: bytes of the device; None if it has no limit to speak of.
    flops: of the matrix products of a step, over all devices.
    forward: the same of the untouched model's forward pass.
    seconds: of tracing and compiling.
    largest: the largest batch that fits, if it was searched for; 0 if none does.
    why: why this target was taken, if nobody named it.
    saved_bits: of a value that the backward pass stores; None for whole values.
    storage: name of the 4-bit format of the backbone's kernels; None for whole numbers.
    narrow: whether numbers of the backbone take two bytes at most.
    backbone: how it is cut over the mesh, see `training.Layout`.
    offload: whether the optimizer's state is in host memory.
    schedule: cycles and moved bytes of a step on one device, where it was compiled.
    traffic: what the devices of the mesh send each other; None if the program cannot be read.
    uncut: what is not cut as its role says, and which tokens are not, see `training.Layout`.
    kernels: what multiplies by 4-bit kernels, and why; '' without any.
    bounds: what of the plan depends on a pass over the training data, which is not made.
  """

  method: str
  target: str
  batch: int
  devices: int
  remat: Remat
  trainable: int
  memory_class: str
  weights: int
  theta: int
  optimizer: int
  argument: int
  temp: int | None
  total: int
  exact: bool
  limit: int | None
  flops: float
  forward: float
  seconds: float
  largest: int | None = None
  why: str = ''
  saved_bits: int | None = None
  storage: str | None = None
  narrow: bool = False
  backbone: str = 'replicated'
  offload: bool = False
  schedule: programs.Schedule | None = None
  traffic: tuple[Traffic, ...] | None = ()
  uncut: tuple[str, ...] = ()
  kernels: str = ''
  bounds: tuple[str, ...] = ()

  @property
  def fits(self) -> bool | None:
    """Whether the step fits the device; None if the target has no limit."""
    if self.limit is None:
      return None
    return self.total <= self.limit

  @property
  def passes(self) -> float:
    """The step's FLOPs in forward passes."""
    return self.flops / self.forward

  @property
  def dominant(self) -> str:
    """The part that takes most of the memory."""
    activations = self.temp
    if activations is None:
      activations = self.total - self.argument
    parts = {
      'weights': self.weights,
      'trained weights': self.theta,
      'optimizer state': self.optimizer,
      'batch': self.argument - self.weights - self.theta - self.optimizer,
      'activations': activations,
    }
    return max(parts, key=parts.get)

  @property
  def advice(self) -> str:
    """What to do about the part that dominates."""
    return advice(self)

  @property
  def time_advice(self) -> str | None:
    """Which part takes most of the time, and what to do about it; None without cycles."""
    if self.schedule is None or not self.schedule.cycles:
      return None
    share = self.schedule.products / self.schedule.cycles
    return time_advice(share, self)

  def row(self) -> dict[str, Any]:
    """As JSON: sizes in MiB (2**20 bytes), FLOPs in 1e9."""

    def size(count: int | None) -> float | None:
      if count is None:
        return None
      return round(count / 2**20, 3)

    return {
      'method': self.method,
      'target': self.target,
      'target_reason': self.why,
      'batch': self.batch,
      'devices': self.devices,
      'remat': self.remat,
      'trainable': self.trainable,
      'memory_class': self.memory_class,
      'weights_mib': size(self.weights),
      'theta_mib': size(self.theta),
      'optimizer_mib': size(self.optimizer),
      'arguments_mib': size(self.argument),
      'temp_mib': size(self.temp),
      'total_mib': size(self.total),
      'exact': self.exact,
      'limit_mib': size(self.limit),
      'fits': self.fits,
      'largest_batch': self.largest,
      'gflop': self.flops / 1e9,
      'forward_gflop': self.forward / 1e9,
      'passes': round(self.passes, 3),
      **timing.entries(self.schedule),
      'dominant': self.dominant,
      'advice': self.advice,
      'time_advice': self.time_advice,
      'compile_seconds': round(self.seconds, 1),
      'traffic': None if self.traffic is None else [one.row() for one in self.traffic],
      'uncut': list(self.uncut),
      'kernels': self.kernels,
      'bounds': list(self.bounds),
    }


class Plans(tuple[Plan, ...]):
  """Plans of several methods; prints as a table."""

  __slots__ = ()

  def __str__(self) -> str:
    rows = columns([HEAD, *map(_cells, self)], right=range(1, len(HEAD)))
    notes = [*map(_note, self)]
    for plan in self:
      sent = plan.traffic
      if sent is None:
        sent = ('what devices send is not known: its program cannot be printed, or not be read',)
      notes += [f'{plan.method}: {one}' for one in (*plan.bounds, *plan.uncut, *sent)]
    notes += [f'{plan.method}: {plan.kernels}' for plan in self if plan.kernels]
    return '\n'.join([_title(self[0]), *rows, *notes])


HEAD = (
  'method',
  'trainable',
  'optimizer',
  'arguments',
  'temp',
  'total MiB',
  'GFLOP',
  'x forward',
  'Mcycles',
  'moved MiB',
  'fits',
  'largest batch',
)


def _title(plan: Plan) -> str:
  limit = 'functional only: its bytes say nothing of an accelerator'
  if plan.limit is not None:
    limit = f'{programs.mib(plan.limit)} each'
  plural = 's' if plan.devices > 1 else ''
  title = f'{plan.target}, {plan.devices} device{plural}, {limit}; batch {plan.batch}'
  if plan.why:
    title += f'\n{plan.target} because {plan.why}'
  return title


def _note(plan: Plan) -> str:
  """What takes most of the memory, and of the time."""
  note = f'{plan.method}: most is {plan.dominant}; to need less, {plan.advice}'
  if plan.time_advice:
    note += f'; {plan.time_advice}'
  return note


def _cells(plan: Plan) -> tuple[str, ...]:
  """A row of the table."""
  remat = {False: '', True: ' + remat'}.get(plan.remat, f' + remat {plan.remat}')
  bound = '' if plan.exact else 'over '
  return (
    f'{plan.method}{remat}',
    f'{plan.trainable:,}',
    _mib(plan.optimizer),
    _mib(plan.argument),
    _mib(plan.temp),
    f'{bound}{_mib(plan.total)}',
    _gflop(plan.flops),
    f'{plan.passes:.2f}',
    *timing.cells(timing.entries(plan.schedule)),
    {None: '-', True: 'yes', False: 'no'}[plan.fits],
    '-' if plan.largest is None else str(plan.largest),
  )


def _mib(count: int | None) -> str:
  if count is None:
    return '-'
  return f'{count / 2**20:,.0f}'


def _gflop(count: float) -> str:
  if count > 1e11:
    return f'{count / 1e9:,.0f}'
  return f'{count / 1e9:.3g}'
