"""What a plan says of one training step, and plans side by side."""

import dataclasses
from typing import Any

from jpeft import programs
from jpeft.core import MEMORY_CLASSES
from jpeft.models import Remat


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one training step of a method asks of one device of a target.

  Attributes:
    method: its name.
    target: see `target.target`.
    batch: examples an update, over all devices.
    devices: of the mesh.
    remat: what is recomputed in the backward pass, see `models.blocks.run_blocks`.
    trainable: numbers that the optimizer sees.
    memory_class: what the backward pass must keep of the backbone.
    weights: bytes of the backbone, which is kept whether or not the step reads it.
    theta: bytes of what is trained.
    optimizer: bytes of the optimizer's state.
    argument: bytes of all that the step is called with.
    temp: bytes it allocates in between; None where it was not compiled.
    total: bytes it needs, at least those of the arguments.
    exact: False where `total` is that lower bound alone.
    limit: bytes of the device; None where there is no limit to speak of.
    flops: of the matrix products of a step, over all devices.
    forward: the same of the untouched model's forward pass.
    seconds: of tracing and compiling.
    largest: the largest batch that fits, where it was searched for; 0 where none does.
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

  @property
  def fits(self) -> bool | None:
    """None where the target has no limit."""
    return None if self.limit is None else self.total <= self.limit

  @property
  def passes(self) -> float:
    """The step's FLOPs in forward passes."""
    return self.flops / self.forward

  @property
  def dominant(self) -> str:
    """The part that takes most of the memory."""
    parts = {
      'weights': self.weights,
      'trained weights': self.theta,
      'optimizer state': self.optimizer,
      'batch': self.argument - self.weights - self.theta - self.optimizer,
      'activations': self.total - self.argument if self.temp is None else self.temp,
    }
    return max(parts, key=parts.get)

  @property
  def advice(self) -> str:
    """What to do about the part that dominates."""
    if self.dominant == 'weights':
      return (
        'hold the backbone in bfloat16 (model.param_dtype) or in 4 bits (model.quantize=nf4), or spread it over '
        'chips (mesh.backbone=sharded)'
      )
    if self.dominant in ('trained weights', 'optimizer state'):
      return (
        'train fewer numbers (lora, lst), take an optimizer with less state (lion, adafactor), or hold its state '
        'in host memory (optimizer.offload)'
      )
    if self.dominant == 'batch':
      return 'take a smaller batch, or shorter inputs'
    if self.memory_class == MEMORY_CLASSES[0]:
      return 'take a smaller batch, or a leaner side network (downsample=pool): the backbone stores nothing'
    if not self.remat:
      return 'recompute blocks in the backward pass (--remat[=dots]), or a method without backbone backprop (lst)'
    return 'take a smaller batch (optimizer.accumulate keeps the update), or a method without backbone backprop (lst)'

  def row(self) -> dict[str, Any]:
    """As JSON: sizes in MiB (2**20 bytes), FLOPs in 1e9."""
    size = lambda n: None if n is None else round(n / 2**20, 3)
    return {
      'method': self.method,
      'target': self.target,
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
      'dominant': self.dominant,
      'advice': self.advice,
      'compile_seconds': round(self.seconds, 1),
    }


class Plans(tuple[Plan, ...]):
  """Plans of several methods; prints as a table."""

  __slots__ = ()

  def __str__(self) -> str:
    head = (
      'method',
      'trainable',
      'optimizer',
      'arguments',
      'temp',
      'total MiB',
      'GFLOP',
      'x forward',
      'fits',
      'largest batch',
    )
    size = lambda n: '-' if n is None else f'{n / 2**20:,.0f}'
    giga = lambda n: f'{n / 1e9:,.0f}' if n > 1e11 else f'{n / 1e9:.3g}'
    answer = {None: '-', True: 'yes', False: 'no'}
    remat = {False: '', True: ' + remat'}
    rows = [
      (
        p.method + remat.get(p.remat, f' + remat {p.remat}'),
        f'{p.trainable:,}',
        size(p.optimizer),
        size(p.argument),
        size(p.temp),
        size(p.total) if p.exact else f'over {size(p.total)}',
        giga(p.flops),
        f'{p.passes:.2f}',
        answer[p.fits],
        '-' if p.largest is None else str(p.largest),
      )
      for p in self
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    pad = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[i])
    line = lambda row: '  '.join(pad(i, cell) for i, cell in enumerate(row))
    first = self[0]
    limit = (
      f'{programs.mib(first.limit)} each'
      if first.limit is not None
      else 'functional only: its bytes say nothing of an accelerator'
    )
    title = f'{first.target}, {first.devices} device{"s" * (first.devices > 1)}, {limit}; batch {first.batch}'
    notes = [f'{p.method}: most is {p.dominant}; to need less, {p.advice}' for p in self]
    return '\n'.join([title, line(head), *map(line, rows), *notes])
