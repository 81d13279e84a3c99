"""NF4: the quantiles of a normal distribution (QLoRA, Dettmers et al., 2023, arXiv 2305.14314)."""

import dataclasses

from pallas_kernels import codes as arithmetic

from .blocks import Blocks, checked


@dataclasses.dataclass(frozen=True)
class Nf4(Blocks):
  """See `nf4`."""

  name = 'nf4'
  zero = 7

  def code(self, blocks):
    x, absmax = arithmetic.normalized(blocks)
    return arithmetic.rank(x, arithmetic.midpoints(arithmetic.NF4)), {'absmax': absmax}

  def value(self, codes, scale, zero):
    return arithmetic.lookup(codes, arithmetic.NF4) * scale


def nf4(block: int = 64, double: bool = False) -> Nf4:
  """4-bit normal floats of QLoRA (arXiv:2305.14314): 4.5 bits a weight, 4.127 with `double`.

  Args:
    block: weights that share a scale.
    double: quantize the scales too.

  Raises:
    ValueError: a block that is no power of two, or smaller than 32.
  """
  return checked(Nf4(block, double))
