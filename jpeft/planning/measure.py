"""The plan of one method at one batch size: a whole training step, compiled from shapes."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jpeft import programs, quant, training
from jpeft.core import Tuned, bounds, noting, summary

from .devices import Target
from .result import Plan
from .traffic import Traffic, traffic_of
from .work import STEPS, Work


def measure(
  work: Work,
  name: str,
  tuned: Tuned,
  optimizer: Callable[[Tuned], optax.GradientTransformation],
  where: Target,
  size: int | None = None,
) -> Plan:
  """The plan of one method at one batch size: of the stage of training that needs the most.

  Args:
    work: what is trained.
    name: of the method.
    tuned: `work.tuned` of the method.
    optimizer: makes the optimizer of what is trained of theta.
    where: the target.
    size: examples an update; those of the work if left out.

  Raises:
    ValueError: the mesh is larger than the target, or does not divide the batch.
  """
  stages = [tuned.at_stage(begin, STEPS) for begin in tuned.stages(STEPS)]
  plans = [_of_stage(work, name, stage, optimizer(stage), where, size) for stage in stages]
  return max(plans, key=lambda plan: plan.total)


def _of_stage(
  work: Work,
  name: str,
  tuned: Tuned,
  tx: optax.GradientTransformation,
  where: Target,
  size: int | None,
) -> Plan:
  start = time.perf_counter()
  size = size or work.size
  mesh = where.mesh(*work.mesh)
  if size % (work.mesh[0] * work.accumulate):
    raise ValueError(
      f'a batch of {size} does not divide over {work.mesh[0]} devices and {work.accumulate} '
      'micro-batches'
    )
  layout = work.layout(tuned, mesh)
  layout.check(work.batch(size))
  shapes = training.state_shapes(tuned, tx, work.variables, work.teacher is not None)
  state, backbone, batch = work.placed(tuned, mesh, shapes, size)
  step = jax.jit(
    work.step(tuned, tx, mesh),
    donate_argnums=0,
    keep_unused=True,
    out_shardings=training.step_shardings(state),
  )
  with noting() as products:
    traced = step.trace(state, backbone, batch)
  known = programs.nbytes((state, backbone, batch))
  needed: dict[str, Any] = {'argument': known, 'temp': None, 'total': known, 'exact': False}
  if where.memory is None or known <= where.memory:
    needed = compiled(traced, known, where.options, mesh)
  facts = summary(tuned)
  return Plan(
    method=name,
    target=where.name,
    why=where.why,
    batch=size,
    devices=mesh.size,
    remat=work.memory.remat,
    saved_bits=tuned.saved_bits,
    storage=work.memory.storage,
    narrow=_is_narrow(backbone),
    backbone=work.backbone,
    offload=work.memory.offload,
    trainable=facts.trainable,
    memory_class=facts.memory,
    weights=programs.nbytes(backbone),
    theta=programs.nbytes(state['theta']),
    optimizer=programs.nbytes(state['optimizer']),
    limit=where.memory,
    flops=programs.flops(traced).all,
    forward=work.forward(size),
    kernels=quant.told(tuned.sites, products, mesh),
    seconds=time.perf_counter() - start,
    bounds=tuple(bounds(tuned.method)),
    uncut=(*layout.exceptions(), *layout.token_exceptions()),
    **needed,
  )


def _is_narrow(backbone) -> bool:
  """Whether most of a backbone's bytes are of numbers of two bytes or fewer."""
  wide = [x for x in jax.tree.leaves(backbone) if x.dtype.itemsize > 2]
  return 2 * programs.nbytes(wide) < programs.nbytes(backbone)


def compiled(traced, known: int, options: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
  """Memory and schedule of a step, and what its devices send each other.

  Of a step that does not fit it is the compiler's own count of its memory alone.
  """
  platform = mesh.devices.flat[0].platform
  try:
    program, text = programs.compiled_with_text(traced, options, known, platform)
  except programs.TooLarge as refused:
    temp = max(0, refused.bytes - known)
    return {'argument': known, 'temp': temp, 'total': refused.bytes, 'exact': True}
  memory = programs.memory(program)
  return {
    'argument': memory.argument,
    'temp': memory.temp,
    'total': memory.total,
    'exact': True,
    'schedule': programs.scheduled(text),
    'traffic': _traffic(text, mesh),
  }


def _traffic(text: str | None, mesh: Mesh) -> tuple[Traffic, ...] | None:
  """What the devices send each other in a compiled step; None if its program cannot be read."""
  if mesh.size == 1:
    return ()
  if text is None:
    return None
  try:
    return traffic_of(programs.collectives_of_text(text, mesh.shape))
  except ValueError:  # written in a way that is not known here, and the plan has more to say
    return None
