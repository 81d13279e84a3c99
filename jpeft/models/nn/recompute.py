"""What a stack of blocks computes again in the backward pass."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
from flax.core import lift

import pallas_kernels
from jpeft import residuals

# False: nothing. True: each block, from its input. 'dots': all of a block but its products with
# weights. 'packed', 'packed4': each block, from its input in 8 or 4 bits.
Remat = bool | Literal['dots', 'packed', 'packed4']
REMATS: tuple[Remat, ...] = (False, True, 'dots', 'packed', 'packed4')
_BITS = {'packed': 8, 'packed4': 4}


def rematted(run: Callable, remat: Remat, scan: bool) -> Callable:
  """run(block, x) -> x, some of which is computed again in the backward pass.

  Args:
    run: calls a module.
    remat: of REMATS.
    scan: whether it is the body of a scan.

  Raises:
    ValueError: `remat` is none of REMATS.
  """
  if remat not in REMATS:
    raise ValueError(f'remat={remat!r} is none of {", ".join(map(repr, REMATS))}')
  if not remat:
    return run
  if remat in _BITS:
    return nn.transforms.lift_transform(_recomputed, run, bits=_BITS[remat], prevent_cse=not scan)
  policy = None
  if remat == 'dots':
    policy = _saves_products
  # The guard against merging the second forward pass with the first costs time; inside a scan
  # XLA cannot merge them anyway.
  return nn.remat(run, prevent_cse=not scan, policy=policy)


def _saves_products(primitive, *args, **params) -> bool:
  """Whether a checkpointed block keeps what an operation returns: of products with weights.

  They have no batch dimensions; those of the attention have.
  """
  of_plain_weights = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return primitive.name == pallas_kernels.OPERATION or of_plain_weights(primitive, *args, **params)


def _recomputed(fn: Callable, bits: int, prevent_cse: bool) -> Callable:
  """`residuals.recomputed` of a function of Flax's scopes, as `flax.core.lift.checkpoint` is."""

  def inner(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
    def pure(lifted, *args, **kwargs):
      scope = scope_fn(*lifted)
      y = fn(scope, *args, **kwargs)
      return y, repack_fn(scope)

    return residuals.recomputed(pure, bits, prevent_cse)((variables, rngs), *args, **kwargs)

  return lift.pack(inner, (True,), (True,), (True,), name='recomputed', enable_kwargs=True)
