"""METHODS x BACKBONES: what the contract is run over, and what each method declares about itself.

A registered method needs no row: it is tested at small sizes, and must leave the function as it was
at step 0 on every backbone. A row says where a method differs from that.
"""

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import Method, prepare, quantize, stand_in
from jpeft.methods import REGISTRY
from jpeft.quant import named
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES
from tests.fixtures.backbone import Backbone

SMALL = {'rank': 2, 'tokens': 3, 'reduction': 4, 'bottleneck': 4}


@dataclasses.dataclass(frozen=True)
class Row:
  """What a method declares.

  Attributes:
    hp: hyperparameters, beside those of SMALL that its factory takes.
    on: {backbone: hyperparameters there}, for patterns other than the default.
    start: how far the output may be from the untouched model's at step 0, in units of its largest
      entry; 0 for bit-equal where nothing is compiled; None where the method starts elsewhere.
    dead: regexes of theta paths that no gradient reaches: what is added to all keys alike moves all
      logits of a softmax alike.
    cannot: {backbone: regex of the error that says so}.
    stored: the backbones' kernels are in the 4-bit format of the registry, without which the method
      has no meaning.
  """

  hp: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  on: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  start: float | None = 1e-5
  dead: tuple[str, ...] = ()
  cannot: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stored: bool = False


CONV = 'linen_cnn'
TOWERS = ('linen_clip', 'linen_siglip')
SWIN, CONVNEXT = 'linen_swin', 'linen_convnext'
CONVS = (CONV, CONVNEXT)
IMAGES = (*(b for b in BACKBONES if 'vit' in b), 'linen_fused', *TOWERS, SWIN, CONVNEXT)
DECODERS = ('linen_gemma', 'nnx_llama', 'nnx_raw', 'linen_gemma2', 'linen_opt')
NO_BIAS = dict.fromkeys(
  [name for name in DECODERS if name != 'linen_opt'],
  'bitfit: .* match, but none has what it adapts',
)
NO_DOOR = dict.fromkeys(
  ('linen_gemma', 'nnx_raw'), 'acts on the input of a layer, and .* offers no injection point'
)
KERNELS = {CONV: {'targets': '{conv}'}, CONVNEXT: {'targets': '{conv}|{linear}'}}
# Where {fc1} and {fc2} are arrays of one module, whose call alone can be wrapped.
WHOLE = dict.fromkeys(('linen_gemma', 'nnx_raw'), {'taps': '{embed}|{attention}|{mlp}'})
TOKENS = r'prompts need tokens \[B, N, D\], and (?:ConvBlock|Stages)'
ONE = 'none has what it adapts|modules that are called|give one prediction|a pooled embedding'
WINDOWS = 'tokens of a method have no place in .* attends within windows of 4'
STREAM = r'reads one stream of tokens \[B, N, d\]'

NO_TOKENS = {**dict.fromkeys(CONVS, TOKENS), SWIN: WINDOWS}
NO_ATTENTION = dict.fromkeys(CONVS, 'no role {attention}')
NO_NORM2 = dict.fromkeys((*CONVS, 'linen_bert', 'linen_opt'), 'no role {norm2}')
# Of models whose blocks lie in stages of several widths.
STAGES = dict.fromkeys((*CONVS, SWIN), STREAM)

ROWS: dict[str, Row] = {
  'linear': Row(start=0),
  'full': Row(start=0),
  'bitfit': Row(start=0, cannot=NO_BIAS),
  'norm': Row(start=0),
  'explora': Row(start=0, on=KERNELS),
  'lora': Row(start=0, on=KERNELS),
  # Its dropout, which is on by default, acts between the two factors.
  'bi_lora': Row(
    start=1e-2,
    on={
      **KERNELS,
      CONVNEXT: {'targets': '{linear}'},
      **dict.fromkeys(NO_DOOR, {'dropout': 0}),
    },
  ),
  'lora_fa': Row(start=0, on=KERNELS),
  'adalora': Row(start=0, on=KERNELS),
  'qlora': Row(start=0, on=KERNELS),
  'peqa': Row(stored=True),
  'dora': Row(on=KERNELS),
  'vera': Row(start=0, on=KERNELS),
  'loha': Row(start=0, on=KERNELS),
  'lokr': Row(start=0, on=KERNELS),
  'hira': Row(start=0, on=KERNELS),
  'oft': Row(hp={'block': 4}, on=KERNELS),
  'boft': Row(hp={'factors': 2}, on=KERNELS),
  'fourierft': Row(hp={'count': 8}, start=0, on=KERNELS),
  'ia3': Row(
    start=0,
    on=dict.fromkeys(CONVS, {'targets_out': '{depthwise}', 'targets_in': '{linear}'}),
  ),
  'lamda': Row(on=KERNELS),
  'paca': Row(start=0, on=KERNELS),
  'pst': Row(on=KERNELS),
  'sct': Row(
    hp={'channels': 4},
    start=None,
    cannot=NO_NORM2,
  ),
  # The kernel that it starts with is random and small: 1.3e-2 of the output of linen_gemma2.
  'snell': Row(start=2e-2),
  'snella': Row(start=1e-1),
  'spt': Row(
    hp={'budget': 600, 'step': 20, 'rank': 1},
    on=KERNELS,
  ),
  'ssf': Row(
    start=None, dead=('.*/key/.*/shift',), on={CONV: {'targets': '{conv}|{bn}|{final_norm}'}}
  ),
  'houlsby': Row(
    start=1e-3,
    on={
      **dict.fromkeys(CONVS, {'targets': '{linear}'}),
      'linen_gemma': {'targets': '{o}|{mlp}'},
      'nnx_raw': {'targets': '{attention}|{mlp}'},
    },
  ),
  'pfeiffer': Row(start=0.1),
  'parallel': Row(start=0, on=dict.fromkeys(CONVS, {'targets': '{linear}'})),
  'mam': Row(start=None, cannot=NO_ATTENTION),
  'adaptformer': Row(start=0, cannot=NO_NORM2),
  'bi_adaptformer': Row(start=1e-2, cannot=NO_NORM2),
  # The head reads the class token alone, which no gate of the last block masks.
  'dyt': Row(
    start=None,
    dead=(r'dyt/(.*/)?(encoder)?blocks?[/_]1/(mlp|MlpBlock_0)/(kernel|bias)',),
    cannot=NO_NORM2,
  ),
  'vpt_shallow': Row(
    start=None,
    cannot={**NO_TOKENS, 'linen_gemma': 'no sequence can grow or shrink'},
  ),
  'vpt_deep': Row(start=None, cannot=NO_TOKENS),
  'e2vpt': Row(hp={'kv_tokens': 2}, start=None, cannot={**NO_ATTENTION, SWIN: WINDOWS}),
  'prefix': Row(start=None, cannot=NO_ATTENTION),
  'prompt_tuning': Row(
    start=None,
    on=dict.fromkeys(('linen_gemma', 'nnx_raw'), {'lookup': 'encode'}),
    cannot={
      **dict.fromkeys((CONV, *IMAGES), 'before words, integers'),
      'nnx_llama': 'a call of its method',
    },
  ),
  'dept': Row(
    hp={'length': 64},
    start=None,
    on=dict.fromkeys(('linen_gemma', 'nnx_raw'), {'lookup': 'encode'}),
    cannot={
      **dict.fromkeys((CONV, *IMAGES), 'before words, integers'),
      'nnx_llama': 'a call of its method',
    },
  ),
  'lst': Row(start=None, cannot=STAGES),
  'qst': Row(start=0, cannot=STAGES),
  'side_tuning': Row(start=None, cannot=STAGES),
  'head2toe': Row(
    hp={'target': 64},
    start=None,
    on={
      **dict.fromkeys(CONVS, {'taps': '{embed}|{conv}|{linear}'}),
      SWIN: {'taps': '{embed}|{mlp}'},
      **WHOLE,
    },
    cannot=dict.fromkeys(DECODERS, ONE),
  ),
  'vqt': Row(
    start=None,
    cannot={**dict.fromkeys(DECODERS, ONE), **NO_ATTENTION, SWIN: WINDOWS},
  ),
  'hst': Row(
    hp={'widths': (8, 8, 12, 12), 'heads': (2, 2, 4, 4)},
    start=None,
    dead=('.*/k/bias',),
    cannot={
      **dict.fromkeys(('linen_bert', *DECODERS), 'a pyramid is built on images'),
      **STAGES,
    },
  ),
  # In two blocks there is one early state, whose share of itself is 1 whatever its score.
  'sherl': Row(start=None, dead=('.*/score/.*',), cannot=STAGES),
  'unipt': Row(start=None, dead=('.*/gate/bias',), cannot=STAGES),
  'unipt_global': Row(
    hp={'width': 4},
    start=None,
    dead=('.*/gate/bias',),
    cannot={**dict.fromkeys(DECODERS, ONE), **STAGES, CONV: f'{STREAM}|pooled embedding'},
  ),
  'meft': Row(
    start=None,
    cannot={
      CONV: 'no role {mlp}',
      **dict.fromkeys((SWIN, CONVNEXT), 'all layers read the same two streams'),
    },
  ),
  'velora': Row(
    hp={'groups': 4}, start=0, cannot={**dict.fromkeys(CONVS, 'no role {v}'), **NO_DOOR}
  ),
  's2a': Row(
    hp={'side': 4},
    start=0,
    on={
      **dict.fromkeys(DECODERS, {'biases': None}),
      **dict.fromkeys(CONVS, {'rank': 0, 'side': 0}),
    },
  ),
  # A bank divides both sides of every kernel.
  'vb_lora': Row(
    hp={'vectors': 6, 'length': 4},
    start=1e-1,
    on={
      CONV: {'targets': '{conv}', 'length': 1},
      CONVNEXT: {'targets': '{conv}|{linear}', 'length': 1},
    },
  ),
  'randlora': Row(hp={'alpha': 4}, start=0, on=KERNELS),
  'eva': Row(
    start=0,
    cannot={**NO_DOOR, **dict.fromkeys(CONVS, 'no role')},
  ),
  # Of words and positions many are not read; a bias of keys moves all logits alike.
  'lt_sft': Row(
    hp={'count': 400, 'first_steps': 2, 'first_lr': 1e-2, 'targets': '{block}(?:/.*)?'},
    dead=('.*bias/delta',),
  ),
  'lamda_pp': Row(on=KERNELS),
  'switchlora': Row(on=KERNELS),
  'light_peft': Row(
    start=None,
    cannot={
      **dict.fromkeys(CONVS, 'no role {q}'),
      **dict.fromkeys(
        ('linen_gemma', 'linen_fused', 'nnx_raw'), 'is measured at linear layers that are called'
      ),
    },
  ),
  'loram': Row(
    hp={'ratio': 0.5, 'skip_first': 0, 'skip_last': 1},
    start=None,
    cannot=dict.fromkeys(CONVS, 'no role {q}'),
  ),
  'loraprune': Row(start=0, cannot=dict.fromkeys(CONVS, 'no role {q}')),
}


def row(method: str) -> Row:
  return ROWS.get(method, Row())


def error_of(method: str, backbone: str) -> str | None:
  """The error that the pair must give, if the method cannot serve the backbone."""
  return row(method).cannot.get(backbone)


def made(method: str, backbone: str, **hp) -> Method:
  """A method of the registry for a backbone, alone (without a trained head) and small.

  One that waits for a pass over examples is as before the pass.
  """
  return stand_in(_made(method, backbone, **hp))


def prepared(method: str, b: Backbone, **hp) -> Method:
  """The same after its pass over examples, if it needs one."""

  def loss(out, labels):
    return sum(jnp.square(y.astype(jnp.float32)).mean() for y in jax.tree.leaves(out))

  args = (*b.args,)
  batches = [(args, np.arange(len(args[0])))]
  made = _made(method, b.name, **hp)
  return prepare(made, b.model, b.backbone, batches, loss=loss, **b.kwargs)


def _made(method: str, backbone: str, **hp) -> Method:
  takes = inspect.signature(REGISTRY[method].make).parameters
  small = {name: value for name, value in SMALL.items() if name in takes}
  there = row(method).on.get(backbone, {})
  return REGISTRY[method].make(**{**small, **row(method).hp, **there, **hp})


def stored(method: str, b: Backbone) -> Backbone:
  """The row of a backbone as the method takes it, its kernels in 4 bits if need be."""
  return _stored(REGISTRY[method].storage, b) if row(method).stored else b


@functools.cache
def _stored(storage: str, b: Backbone) -> Backbone:
  with described(b):
    held = quantize(b.model, named(storage), b.backbone, *b.args, **b.kwargs)
  return dataclasses.replace(b, backbone=held)


def patterns(method: str) -> list[str]:
  """The hyperparameters that are patterns of sites."""
  takes = inspect.signature(REGISTRY[method].make).parameters.values()
  return [p.name for p in takes if isinstance(p.default, str) and '{' in p.default]


def takes_dropout(method: str) -> bool:
  return 'dropout' in inspect.signature(REGISTRY[method].make).parameters


SCANS = ('linen_vit_scan', 'nnx_vit_scan')


def spread() -> list[tuple[str, str]]:
  """Pairs for every run: each method on one backbone, and each backbone with some methods.

  Scanned stacks take twice as many as others, as more can go wrong there.
  """
  chosen, load = [], Counter()
  for method in sorted(REGISTRY, key=lambda m: -len(row(m).cannot)):  # the choosiest first
    fit = [b for b in BACKBONES if error_of(method, b) is None]
    backbone = min(fit, key=lambda b: load[b] / (2 if b in SCANS else 1))
    chosen.append((method, backbone))
    load[backbone] += 1
  return chosen


ALL = [(m, b) for m in REGISTRY for b in BACKBONES]
SERVED = [pair for pair in ALL if error_of(*pair) is None]
REFUSED = [pair for pair in ALL if error_of(*pair) is not None]
DEFAULT = spread()


def over(pairs, always=DEFAULT, fixture='pair'):
  """Parametrises a test by pairs; those that are not in `always` are slow.

  `pair` receives the Pair, any other name the names of method and backbone.
  """

  def param(method, backbone):
    marks = [] if (method, backbone) in always else [pytest.mark.slow]
    return pytest.param((method, backbone), id=f'{method}-{backbone}', marks=marks)

  params = [param(*p) for p in sorted(pairs, key=lambda p: p[1])]
  return pytest.mark.parametrize(fixture, params, indirect=fixture == 'pair')


def one_each(pairs=DEFAULT) -> list[tuple[str, str]]:
  """One pair of every method, not always on the same backbone."""
  by_method = {m: [p for p in pairs if p[0] == m] for m in REGISTRY}
  return [found[i % len(found)] for i, found in enumerate(by_method.values()) if found]


# A tied head is the embedding: a gradient of the table comes through all of the model.
TIED = {('linear', 'linen_gemma'), ('linear', 'nnx_raw')}


def memory_class(method: str, backbone: str) -> str:
  """What a backward pass of a method keeps of a backbone."""
  if (method, backbone) in TIED:
    return 'full crossing'
  return REGISTRY[method].memory
