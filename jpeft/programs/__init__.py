"""Programs as JAX traces and compiles them: equations, cuts, costs."""

from .by_token import mixing
from .collectives import Collective, collectives, collectives_of_text
from .compile import TooLarge, compiled, memory, mib, nbytes
from .compiled_text import parsed
from .cost import flops, uncounted
from .crossing import Crossing, crossing
from .cut import Halves, cut
from .equations import evaluated, hoisted, inside, reader, variables
from .printed import compiled_with_text
from .schedule import Schedule, schedule, scheduled
from .traced import Static, Traced, has_gradient, plain_zero, vjp_in

__all__ = [
  'Collective',
  'Crossing',
  'Halves',
  'Schedule',
  'Static',
  'TooLarge',
  'Traced',
  'collectives',
  'collectives_of_text',
  'compiled',
  'compiled_with_text',
  'crossing',
  'cut',
  'evaluated',
  'flops',
  'has_gradient',
  'hoisted',
  'inside',
  'memory',
  'mib',
  'mixing',
  'nbytes',
  'parsed',
  'plain_zero',
  'reader',
  'schedule',
  'scheduled',
  'uncounted',
  'variables',
  'vjp_in',
]
