"""jpeft: parameter- and memory-efficient transfer learning for JAX and Flax."""

import importlib

from .core import *  # noqa: F403
from .core import __all__ as _core
from .methods import *  # noqa: F403
from .methods import __all__ as _methods
from .programs import Halves, cut
from .quant import affine, fp4, int4, nbytes, nf4, quantize
from .version import __version__

_LAZY = {'load': 'models', 'save_pretrained': 'models', 'load_adapter': 'adapter', 'save_adapter': 'adapter',
         'plan': 'plan'}


def __getattr__(name: str):
  """Backbones, and what trains, are imported when they are first asked for."""
  if name in _LAZY:
    module = importlib.import_module(f'.{_LAZY[name]}', __name__)
    return module if name == _LAZY[name] else getattr(module, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


__all__ = [*_core, *_methods, *_LAZY, 'Halves', '__version__', 'affine', 'cut', 'fp4', 'int4', 'nbytes', 'nf4', 'quantize']
