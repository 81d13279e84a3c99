"""One file a method, one row a method in the registry."""

from .adapter.binary import bi_adaptformer, bi_head, bi_lora, from_bits, to_bits
from .adapter.bottleneck import adaptformer, houlsby, parallel, pfeiffer
from .adapter.dyt import dyt
from .adapter.mam import mam
from .arguments import on_first
from .keys import more_keys
from .memory.meft import meft, reconstruction_error
from .memory.s2a import packed, s2a
from .memory.tiled import tiled
from .memory.velora import directed, projected, velora
from .nn import drop
from .presets import names, preset
from .prompt.dept import dept
from .prompt.e2vpt import e2vpt
from .prompt.prefix import prefix
from .prompt.prompt_tuning import prompt_tuning
from .prompt.vpt import vpt_deep, vpt_shallow
from .registry import REGISTRY, Entry, make, register_method
from .side.dist import dist
from .side.features import group_lasso, select
from .side.head2toe import head2toe
from .side.hst import hst
from .side.lst import lst, side_tuning
from .side.prune import fisher
from .side.qst import qst
from .side.r2_tuning import r2_tuning
from .side.sherl import sherl
from .side.unipt import unipt, unipt_global
from .side.vqt import vqt
from .subset.explora import explora
from .subset.tune import bitfit, full, linear, norm, tune
from .tokens import Tokens
from .weight.adalora import adalora
from .weight.eva import eva
from .weight.fourierft import drawn_places, fourierft
from .weight.hadamard import hira, loha
from .weight.ia3 import ia3
from .weight.kronecker import lokr
from .weight.lamda import lamda
from .weight.lamda_pp import lamda_pp
from .weight.light_peft import light_peft
from .weight.lora import dora, lora, lora_fa, qlora
from .weight.loram import loram
from .weight.loraprune import loraprune
from .weight.lt_sft import lt_sft
from .weight.orthogonal import boft, oft
from .weight.paca import paca
from .weight.peqa import peqa
from .weight.pst import pst
from .weight.randlora import bases_of, randlora
from .weight.sct import sct
from .weight.snell import snell
from .weight.snella import snella
from .weight.spt import spt
from .weight.ssf import ssf
from .weight.switchlora import switchlora
from .weight.vb_lora import mixed, vb_lora
from .weight.vera import vera, vera_pair

__all__ = [
  'adalora',
  'bases_of',
  'boft',
  'Entry',
  'eva',
  'fourierft',
  'hira',
  'loha',
  'lokr',
  'oft',
  'REGISTRY',
  'Tokens',
  'adaptformer',
  'bi_adaptformer',
  'bi_head',
  'bi_lora',
  'bitfit',
  'dept',
  'directed',
  'dist',
  'dora',
  'drawn_places',
  'drop',
  'dyt',
  'e2vpt',
  'explora',
  'fisher',
  'from_bits',
  'full',
  'group_lasso',
  'head2toe',
  'houlsby',
  'hst',
  'ia3',
  'lamda',
  'lamda_pp',
  'light_peft',
  'linear',
  'lora',
  'lora_fa',
  'loram',
  'loraprune',
  'lst',
  'lt_sft',
  'make',
  'mam',
  'meft',
  'more_keys',
  'names',
  'norm',
  'on_first',
  'paca',
  'packed',
  'parallel',
  'peqa',
  'pfeiffer',
  'mixed',
  'prefix',
  'preset',
  'projected',
  'prompt_tuning',
  'pst',
  'qlora',
  'qst',
  'r2_tuning',
  'randlora',
  'reconstruction_error',
  'register_method',
  's2a',
  'sct',
  'select',
  'sherl',
  'side_tuning',
  'snell',
  'snella',
  'spt',
  'ssf',
  'switchlora',
  'tiled',
  'to_bits',
  'tune',
  'unipt',
  'unipt_global',
  'vb_lora',
  'velora',
  'vera',
  'vera_pair',
  'vpt_deep',
  'vpt_shallow',
  'vqt',
]
