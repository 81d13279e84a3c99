"""Programs of a run, compiled from shapes.

A program that cannot fit is refused before anything is put on a device.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from jpeft import programs

from .sharding import replicated


def compiled(
  fn: Callable, *args, donate: tuple[int, ...] = (), out: Any = None
) -> tuple[Callable, dict[str, float]]:
  """(fn compiled for these arguments, its costs as XLA reports them).

  The costs: flops (with every round of its loops) and bytes_accessed of one call on one device,
  bytes of arguments, output, alias, temporaries and of all, and seconds of compilation. A backend
  that does not report some leaves them out. An argument that the program does not read counts all
  the same, because it stays on the device.

  Args:
    fn: what is compiled.
    *args: shapes with shardings.
    donate: positions of arguments that are donated.
    out: shardings of what it returns; the compiler chooses them if left out.

  Raises:
    programs.TooLarge: it does not fit the device, and the compiler reports that.
  """
  start = time.perf_counter()
  jitted = jax.jit(fn, donate_argnums=donate, keep_unused=True, out_shardings=out)
  traced = jitted.trace(*args)
  program = programs.compiled(traced, arguments=programs.nbytes(args))
  cost: dict[str, float] = {'compile_seconds': round(time.perf_counter() - start, 2)}
  analysis = program.cost_analysis() or {}
  if 'flops' in analysis:
    cost['flops'] = analysis['flops'] + programs.uncounted(traced, _devices_of(args))
  if 'bytes accessed' in analysis:
    cost['bytes_accessed'] = analysis['bytes accessed']
  memory = programs.memory(program)
  if memory is not None:
    cost |= {f'{part}_bytes': size for part, size in dataclasses.asdict(memory).items()}
    cost['total_bytes'] = memory.total
  return program, cost


def _devices_of(args) -> int:
  """The number of devices that the arguments are spread over."""
  shardings = [getattr(x, 'sharding', None) for x in jax.tree.leaves(args)]
  return max((len(s.device_set) for s in shardings if s), default=1)


def limit_of(device) -> int | None:
  """The bytes that a device has for a program; None if it does not report that."""
  return (device.memory_stats() or {}).get('bytes_limit')


def step_shardings(state) -> tuple[Any, NamedSharding]:
  """The shardings of what an update returns: the state where it was, so that it can go on."""
  where = jax.tree.map(lambda x: x.sharding, state)
  return where, replicated(where['step'].mesh)


def fitting(update: Callable, state, backbone, batch) -> tuple[Callable, dict[str, float]]:
  """`compiled` for an update whose state is donated, and which fits its devices.

  Args:
    update: from `train_step`.
    state, backbone, batch: shapes, from `with_sharding`.

  Returns:
    (program, costs). The costs also have the bytes of weights and state, and of all if the compiler
    reports them.

  Raises:
    ValueError: it needs more than a device has; the message says how much, and for what.
  """
  device = next(iter(jax.tree.leaves(batch)[0].sharding.addressable_devices))
  limit = limit_of(device)
  parts = {'weights_bytes': programs.nbytes(backbone), 'state_bytes': programs.nbytes(state)}
  try:
    program, cost = compiled(update, state, backbone, batch, donate=(0,), out=step_shardings(state))
    total = cost.get('total_bytes', 0)
    if limit is None or total <= limit:
      return program, cost | parts
  except programs.TooLarge as refused:
    total = refused.bytes
  available = 'less'
  if limit:
    available = programs.mib(limit)
  raise ValueError(
    f'an update of {batch["label"].shape[0]} examples needs {programs.mib(total)} on a device that '
    f'has {available}: weights {programs.mib(parts["weights_bytes"])}, what is trained and its '
    f'optimizer {programs.mib(parts["state_bytes"])}, the rest activations; take a smaller '
    'data.batch_size, model.remat=true or a method that keeps less: python -m jpeft.plan with the '
    'same --config says what fits'
  )
