"""What to do about the part of a step that takes most of the memory, or of the time."""

from jpeft.core import NO_BACKPROP
from jpeft.models import Remat


def advice(dominant: str, memory_class: str, remat: Remat) -> str:
  """How to need less memory, in words that end a sentence.

  Args:
    dominant: the part that takes most: 'weights', 'trained weights', 'optimizer state', 'batch' or
      'activations'.
    memory_class: of the method.
    remat: of the model.
  """
  if dominant == 'weights':
    return (
      'hold the backbone in bfloat16 (model.param_dtype) or in 4 bits (model.quantize=nf4), or '
      'spread it over chips (mesh.backbone=sharded, or fsdp)'
    )
  if dominant in ('trained weights', 'optimizer state'):
    return (
      'train fewer numbers (lora, lst), take an optimizer with less state (lion, adafactor), hold '
      'its state in host memory (optimizer.offload), or spread it over chips (mesh.data)'
    )
  if dominant == 'batch':
    return 'take a smaller batch, or shorter inputs'
  if memory_class == NO_BACKPROP:
    return (
      'take a smaller batch, or a leaner side network (downsample=pool): the backbone stores '
      'nothing'
    )
  if not remat:
    return (
      'recompute blocks in the backward pass (--remat[=dots|packed]), or a method without backbone '
      'backprop (lst)'
    )
  if remat in (True, 'dots'):
    return (
      'recompute blocks from inputs in 8 or 4 bits (--remat=packed, packed4), take a smaller batch '
      '(optimizer.accumulate keeps the update), or a method without backbone backprop (lst)'
    )
  return (
    'take a smaller batch (optimizer.accumulate keeps the update), or a method without backbone '
    'backprop (lst)'
  )


def time_advice(
  products: float, memory_class: str, remat: Remat, saved_bits: int | None = None
) -> str:
  """What most of a step's cycles go to, and how to need fewer.

  Args:
    products: the share of the cycles that is of matrix products.
    memory_class: of the method.
    remat: of the model.
    saved_bits: of a value that the backward pass stores; None for whole values.
  """
  told = f'{products:.0%} of its cycles are of products'
  if products >= _MOSTLY:
    if memory_class == NO_BACKPROP:
      return f'{told}, most of them the forward pass'
    return f'{told}; to take less time, a method without backbone backprop (lst)'
  if saved_bits:
    return f'{told}: packing residuals takes time, of which recomputing (--remat) may take less'
  if memory_class != NO_BACKPROP and not remat:
    return f'{told}: storing residuals takes time, of which recomputing (--remat) may take less'
  return f'{told}: the rest is of norms, softmax and what changes or moves arrays'


# The share of the cycles from which on products are what takes the time.
_MOSTLY = 0.7
