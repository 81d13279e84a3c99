"""jpeft: parameter- and memory-efficient transfer learning for JAX and Flax."""

from .core import *  # noqa: F403
from .core import __all__ as _core
from .methods import *  # noqa: F403
from .methods import __all__ as _methods

from .version import __version__
__all__ = [*_core, *_methods]
