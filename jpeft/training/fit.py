"""Programs of a run, compiled from shapes: what cannot fit is refused before anything lies on a
device.
"""

import dataclasses
import time
from collections.abc import Callable

import jax

from jpeft import programs as costs


def compiled(
  fn: Callable, *args, donate: tuple[int, ...] = ()
) -> tuple[Callable, dict[str, float]]:
  """(fn compiled for these arguments, what XLA says it costs).

  The costs: flops (with every round of its loops) and bytes_accessed of one call on one device,
  bytes of arguments, output, alias, temporaries and of all, and seconds of compilation. A backend
  that does not say leaves them out. What the program does not read is an argument all the same: it
  is kept on the device.

  Raises:
    cost.TooLarge: it does not fit the device, and the compiler says so.
  """
  start = time.perf_counter()
  traced = jax.jit(fn, donate_argnums=donate, keep_unused=True).trace(*args)
  program = costs.compiled(traced, arguments=costs.nbytes(args))
  cost: dict[str, float] = {'compile_seconds': round(time.perf_counter() - start, 2)}
  analysis, memory = program.cost_analysis() or {}, costs.memory(program)
  if 'flops' in analysis:
    shardings = [x.sharding for x in jax.tree.leaves(args) if getattr(x, 'sharding', None)]
    devices = max((len(s.device_set) for s in shardings), default=1)
    cost['flops'] = analysis['flops'] + costs.uncounted(traced, devices)
  if 'bytes accessed' in analysis:
    cost['bytes_accessed'] = analysis['bytes accessed']
  if memory is not None:
    cost |= {f'{part}_bytes': size for part, size in dataclasses.asdict(memory).items()}
    cost['total_bytes'] = memory.total
  return program, cost


def limit_of(device) -> int | None:
  """The bytes that a device lets a program have; None where it does not say."""
  return (device.memory_stats() or {}).get('bytes_limit')


def fitting(update: Callable, state, backbone, batch) -> tuple[Callable, dict[str, float]]:
  """`compiled` for an update whose state is donated, and whose memory its devices have.

  Args:
    update: from `train_step`.
    state, backbone, batch: shapes, as `laid`.

  Returns:
    (program, costs); the costs also say the bytes of weights, state and all, where the compiler
    does.

  Raises:
    ValueError: it needs more than a device has; says how much, and for what.
  """
  limit = limit_of(next(iter(jax.tree.leaves(batch)[0].sharding.device_set)))
  parts = {'weights_bytes': costs.nbytes(backbone), 'state_bytes': costs.nbytes(state)}
  try:
    program, cost = compiled(update, state, backbone, batch, donate=(0,))
    total = cost.get('total_bytes', 0)
    if limit is None or total <= limit:
      return program, cost | parts
  except costs.TooLarge as refused:
    total = refused.bytes
  size, has = batch['label'].shape[0], costs.mib(limit) if limit else 'less'
  raise ValueError(
    f'an update of {size} examples needs {costs.mib(total)} on a device that has {has}: weights '
    f'{costs.mib(parts["weights_bytes"])}, what is trained and its optimizer {costs.mib(parts["state_bytes"])}, the '
    'rest activations; take a smaller data.batch_size, model.remat=true or a method that keeps less: python -m '
    'jpeft.plan with the same --config says what fits'
  )
