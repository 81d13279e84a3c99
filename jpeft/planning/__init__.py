"""What a training step needs of a device that need not be there."""

from . import drawing, timing
from .configs import classes_of, of_configs, with_method
from .devices import Target, leave_accelerators, target
from .plan import plan
from .plot import plot
from .result import Plan, Plans
from .work import STEPS, Work

__all__ = [
  'STEPS',
  'Plan',
  'Plans',
  'Target',
  'Work',
  'classes_of',
  'drawing',
  'leave_accelerators',
  'of_configs',
  'plan',
  'plot',
  'target',
  'timing',
  'with_method',
]
