"""Programs as JAX traces and compiles them: equations, cuts, costs."""

from .collectives import Collective, collectives
from .compile import TooLarge, compiled, memory, mib, nbytes
from .cost import flops, uncounted
from .crossing import Crossing, crossing
from .cut import Halves, cut
from .cycles import Operation, cycles, operations
from .equations import evaluated, hoisted, inside, reader, variables
from .schedule import Schedule, schedule
from .traced import Static, Traced, has_gradient

__all__ = [
  'Collective',
  'Crossing',
  'Halves',
  'Schedule',
  'Operation',
  'Static',
  'TooLarge',
  'Traced',
  'collectives',
  'compiled',
  'crossing',
  'cut',
  'cycles',
  'evaluated',
  'flops',
  'has_gradient',
  'hoisted',
  'inside',
  'memory',
  'mib',
  'nbytes',
  'operations',
  'reader',
  'schedule',
  'uncounted',
  'variables',
]
