"""jpeft: parameter- and memory-efficient transfer learning for JAX and Flax."""

import importlib
from typing import TYPE_CHECKING

# Registers naming schemes; the backbones are imported on first use, as the names in _LAZY.
from jpeft import models as models
from jpeft.contract import Checks, check
from jpeft.core import (
  ANATOMIES,
  Anatomy,
  Bound,
  Box,
  Call,
  Leaf,
  Method,
  Site,
  Sites,
  Tuned,
  Weight,
  at,
  attach,
  chain,
  count,
  freeze,
  in_layers,
  join,
  mask,
  matrix,
  register_anatomy,
  sites_of,
  split,
  summary,
)
from jpeft.methods import (
  REGISTRY,
  Entry,
  adaptformer,
  bitfit,
  directed,
  dist,
  dora,
  fisher,
  full,
  group_lasso,
  head2toe,
  houlsby,
  hst,
  ia3,
  linear,
  lora,
  lora_fa,
  lst,
  make,
  meft,
  norm,
  packed,
  parallel,
  peqa,
  pfeiffer,
  prefix,
  projected,
  qlora,
  qst,
  r2_tuning,
  reconstruction_error,
  register_method,
  s2a,
  select,
  sherl,
  side_tuning,
  ssf,
  tune,
  unipt,
  unipt_global,
  velora,
  vera,
  vpt_deep,
  vpt_shallow,
  vqt,
)
from jpeft.programs import Halves, cut
from jpeft.quant import affine, fp4, int4, nbytes, nf4, quantize, register_format
from jpeft.version import __version__

if TYPE_CHECKING:
  from jpeft.data import register_dataset
  from jpeft.export import load_adapter, save_adapter
  from jpeft.models import load, save_pretrained
  from jpeft.tasks import register_metric, register_modality

# Backbones and what trains are imported when they are first asked for: `import jpeft` is light.
_LAZY = {
  'load': 'models',
  'save_pretrained': 'models',
  'load_adapter': 'export',
  'save_adapter': 'export',
  'plan': 'plan',
  'register_dataset': 'data',
  'register_metric': 'tasks',
  'register_modality': 'tasks',
}


def __getattr__(name: str):
  """The public names that are imported on first use."""
  if name in _LAZY:
    module = importlib.import_module(f'.{_LAZY[name]}', __name__)
    return module if name == _LAZY[name] else getattr(module, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  """All public names, those that are not imported yet among them."""
  return sorted({*globals(), *__all__})


__all__ = [
  'ANATOMIES',
  'Anatomy',
  'Bound',
  'Box',
  'Call',
  'Checks',
  'Entry',
  'Halves',
  'Leaf',
  'Method',
  'REGISTRY',
  'Site',
  'Sites',
  'Tuned',
  'Weight',
  '__version__',
  'adaptformer',
  'affine',
  'at',
  'attach',
  'bitfit',
  'chain',
  'check',
  'count',
  'cut',
  'directed',
  'dist',
  'dora',
  'fisher',
  'fp4',
  'freeze',
  'full',
  'group_lasso',
  'head2toe',
  'houlsby',
  'hst',
  'ia3',
  'in_layers',
  'int4',
  'join',
  'linear',
  'load',
  'load_adapter',
  'lora',
  'lora_fa',
  'lst',
  'make',
  'mask',
  'matrix',
  'meft',
  'nbytes',
  'nf4',
  'norm',
  'packed',
  'parallel',
  'peqa',
  'pfeiffer',
  'plan',
  'prefix',
  'projected',
  'qlora',
  'qst',
  'quantize',
  'r2_tuning',
  'reconstruction_error',
  'register_anatomy',
  'register_dataset',
  'register_format',
  'register_method',
  'register_metric',
  'register_modality',
  's2a',
  'save_adapter',
  'save_pretrained',
  'select',
  'sherl',
  'side_tuning',
  'sites_of',
  'split',
  'ssf',
  'summary',
  'tune',
  'unipt',
  'unipt_global',
  'velora',
  'vera',
  'vpt_deep',
  'vpt_shallow',
  'vqt',
]
