"""What a training step needs of a device that need not be there."""

from .configs import classes_of, of_configs, with_method
from .devices import Target, target
from .plan import plan
from .plot import plot
from .result import Plans
from .work import Work

__all__ = [
  'Plans',
  'Target',
  'Work',
  'classes_of',
  'of_configs',
  'plan',
  'plot',
  'target',
  'with_method',
]
