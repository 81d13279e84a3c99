"""FP4: 4-bit floats as bitsandbytes has them, a sign and three bits of magnitude."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import codes as arithmetic

from .blocks import Blocks, checked

# The codes of the magnitudes, in ascending order of these.
_ASCENDING = np.argsort(arithmetic.FP4[:8])
_THRESHOLDS = arithmetic.midpoints(arithmetic.FP4[_ASCENDING])
_SIGN = 8


@dataclasses.dataclass(frozen=True)
class Fp4(Blocks):
  """See `fp4`."""

  name = 'fp4'

  def code(self, blocks):
    x, absmax = arithmetic.normalized(blocks)
    level = arithmetic.rank(jnp.abs(x), _THRESHOLDS)
    magnitude = arithmetic.lookup(level, _ASCENDING.astype(np.uint8))
    sign = jnp.where(x < 0, _SIGN, 0).astype(jnp.uint8)
    return magnitude | sign, {'absmax': absmax}

  def value(self, codes, scale, zero):
    return arithmetic.lookup(codes, arithmetic.FP4) * scale


def fp4(block: int = 64, double: bool = False) -> Fp4:
  """4-bit floats as bitsandbytes has them; for the arguments see `nf4`."""
  return checked(Fp4(block, double))
