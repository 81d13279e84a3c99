"""What to do about the part of a step that takes most of the memory, or of the time.

Nothing is proposed that is already on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jpeft.core import NO_BACKPROP

if TYPE_CHECKING:
  from .result import Plan


def advice(plan: Plan) -> str:
  """How to need less memory, in words that end a sentence."""
  dominant = plan.dominant
  if dominant == 'weights':
    return _either(*_narrower(plan), _spread_weights(plan))
  if dominant in ('trained weights', 'optimizer state'):
    return _either('train fewer numbers (lora, lst)', *_leaner_state(plan), _spread_state(plan))
  if dominant == 'batch':
    return 'take a smaller batch, or shorter inputs'
  if plan.memory_class == NO_BACKPROP:
    return (
      'take a smaller batch, or a leaner side network (downsample=pool): the backbone stores '
      'nothing'
    )
  without = 'a method without backbone backprop (lst)'
  if not plan.remat and not plan.saved_bits:
    return _either('recompute blocks in the backward pass (--remat[=dots|packed])', without)
  smaller = 'take a smaller batch (optimizer.accumulate keeps the update)'
  if plan.remat in (False, True, 'dots'):
    coded = 'recompute blocks from inputs in 8 or 4 bits (--remat=packed, packed4)'
    return _either(coded, smaller, without)
  return _either(smaller, without)


def _narrower(plan: Plan) -> list[str]:
  """How a backbone takes fewer bits."""
  if plan.storage is not None:
    return []
  if plan.narrow:
    return ['hold the backbone in 4 bits (model.quantize=nf4)']
  return ['hold the backbone in bfloat16 (model.param_dtype) or in 4 bits (model.quantize=nf4)']


def _spread_weights(plan: Plan) -> str:
  """How chips share a backbone."""
  if plan.backbone == 'replicated':
    return 'spread it over chips (mesh.backbone=sharded, or fsdp)'
  return 'spread it over more chips (mesh.data, mesh.model)'


def _leaner_state(plan: Plan) -> list[str]:
  """How an optimizer has less on a chip."""
  found = []
  if plan.optimizer > 1.5 * plan.theta:  # two numbers for each that is trained, as Adam has
    found.append('take an optimizer with less state (adamw_8bit, lion, adafactor)')
  if plan.optimizer and not plan.offload:
    found.append('hold its state in host memory (optimizer.offload)')
  return found


def _spread_state(plan: Plan) -> str:
  """How chips share what is trained."""
  if plan.devices == 1:
    return 'spread it over chips (mesh.data)'
  return 'spread it over more chips (mesh.data)'


def _either(*ways: str) -> str:
  """Ways as a list in words."""
  *others, last = ways
  if not others:
    return last
  return f'{", ".join(others)}, or {last}'


def time_advice(products: float, plan: Plan) -> str:
  """What most of a step's cycles go to, and how to need fewer.

  Args:
    products: the share of the cycles that is of matrix products.
    plan: of the step.
  """
  told = f'{products:.0%} of its cycles are of products'
  if products >= _MOSTLY:
    if plan.memory_class == NO_BACKPROP:
      return f'{told}, most of them the forward pass'
    return f'{told}; to take less time, a method without backbone backprop (lst)'
  again = ''
  if not plan.remat:
    again = ', of which recomputing (--remat) may take less'
  if plan.saved_bits:
    return f'{told}: packing residuals takes time{again}'
  if plan.remat in ('packed', 'packed4'):
    return f'{told}: coding the inputs of blocks takes time'
  if plan.memory_class != NO_BACKPROP and again:
    return f'{told}: storing residuals takes time{again}'
  return f'{told}: the rest is of norms, softmax and what changes or moves arrays'


# The share of the cycles from which on products are what takes the time.
_MOSTLY = 0.7
