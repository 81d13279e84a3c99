"""x"""
from ..core import Call, Method, at
from ..quant.residuals import compressed


def packed(blocks: str = '{block}', bits: int = 4, operand_bits: int = 8, name: str = 'packed') -> Method:
  def apply(t, call, *args, **kwargs):
    fn, arrays = call.pure()
    return compressed(fn, bits, operand_bits)(arrays, *args, **kwargs)

  return at(blocks, Call(name, apply))
