"""One file a method, one row a method: what it is, where it comes from, what it costs."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

from jpeft.core import NO_BACKPROP, Method, Rule, chain, in_layers, memory_class
from jpeft.messages import did_you_mean
from jpeft.registering import module_of

from .adapter.binary import bi_adaptformer, bi_lora
from .adapter.bottleneck import adaptformer, houlsby, parallel, pfeiffer
from .adapter.dyt import dyt
from .adapter.mam import mam
from .memory.meft import meft
from .memory.s2a import packed, s2a
from .memory.velora import velora
from .prompt.dept import dept
from .prompt.e2vpt import e2vpt
from .prompt.prefix import prefix
from .prompt.prompt_tuning import prompt_tuning
from .prompt.vpt import vpt_deep, vpt_shallow
from .side.head2toe import head2toe
from .side.hst import hst
from .side.lst import lst, side_tuning
from .side.qst import qst
from .side.sherl import sherl
from .side.unipt import unipt, unipt_global
from .side.vqt import vqt
from .subset.explora import explora
from .subset.tune import bitfit, full, linear, norm, tune
from .weight.adalora import adalora
from .weight.eva import eva
from .weight.fourierft import fourierft
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
from .weight.randlora import randlora
from .weight.sct import sct
from .weight.snell import snell
from .weight.snella import snella
from .weight.spt import spt
from .weight.ssf import ssf
from .weight.switchlora import switchlora
from .weight.vb_lora import vb_lora
from .weight.vera import vera

# Keys of the method section of a configuration that are not of the factory. So is `head`, unless it
# is a pattern, which a factory with an argument of that name gets.
RESERVED = ('start', 'start_head', 'saved_bits')


@dataclasses.dataclass(frozen=True)
class Entry:
  """A row of the registry.

  Attributes:
    make: the factory; its keyword arguments are the method's hyperparameters.
    paper: arXiv id, or '-'.
    title: one line.
    storage: the 4-bit format of the backbone's kernels (`quant.formats.FORMATS`) that the method is
      made for, used where nothing else is asked for; None for the kernels as they are loaded.
    module: where the method was registered; None for a method of jpeft.
  """

  make: Callable[..., Method]
  paper: str
  title: str
  storage: str | None = None
  module: str | None = None

  @functools.cached_property
  def rules(self) -> tuple[Rule, ...]:
    """The rules of the method with its default hyperparameters."""
    return tuple(rule for _, rule in self.make())

  @property
  def memory(self) -> str:
    """What the backward pass must keep of the backbone."""
    return memory_class(self.rules)

  @property
  def mergeable(self) -> bool:
    """Whether `merge` gives plain weights."""
    return all(rule.mergeable for rule in self.rules)

  @property
  def head(self) -> bool:
    """Whether the method trains the head by itself."""
    return any(rule.head for rule in self.rules)


REGISTRY: dict[str, Entry] = {
  'linear': Entry(linear, '-', 'linear probe: the head alone'),
  'full': Entry(full, '-', 'full fine-tuning'),
  'bitfit': Entry(bitfit, '2106.10199', 'BitFit: biases'),
  'norm': Entry(norm, '2302.07937', 'norm tuning: scales and shifts'),
  'explora': Entry(
    explora, '2406.10973', 'ExPLoRA: some blocks whole, LoRA in the others, all norms'
  ),
  'lora': Entry(
    lora, '2106.09685', 'LoRA, rsLoRA, PiSSA, OLoRA: a low-rank product beside each matrix'
  ),
  'bi_lora': Entry(bi_lora, '2307.16867', 'LoRA with weights of one bit'),
  'lora_fa': Entry(lora_fa, '2308.03303', 'LoRA-FA: LoRA whose first factor stays as drawn'),
  'eva': Entry(eva, '2410.07170', 'EVA: LoRA of ranks and starts by what enters the layers'),
  'adalora': Entry(adalora, '2303.10512', 'AdaLoRA: singular triplets, the least of which go'),
  'qlora': Entry(
    qlora, '2305.14314', 'QLoRA: LoRA on every linear map of a 4-bit backbone', storage='nf4_double'
  ),
  'peqa': Entry(peqa, '2305.14152', 'PEQA: the scales of integer kernels', storage='affine'),
  'dora': Entry(dora, '2402.09353', 'DoRA: LoRA for directions, a magnitude a column'),
  'vera': Entry(vera, '2310.11454', 'VeRA: two vectors around a shared random pair'),
  'vb_lora': Entry(vb_lora, '2405.15179', 'VB-LoRA: LoRA mixed from one bank of short vectors'),
  'randlora': Entry(
    randlora, '2502.00987', 'RandLoRA: full rank, from random bases and trained diagonals'
  ),
  'loha': Entry(loha, '2108.06098', 'LoHa: the entrywise product of two low-rank products'),
  'lokr': Entry(lokr, '2309.14859', 'LoKr: the Kronecker product of two small matrices'),
  'hira': Entry(hira, '-', 'HiRA: kernels times low-rank products, entrywise'),
  'oft': Entry(oft, '2306.07280', "OFT: blocks of a kernel's inputs are rotated"),
  'boft': Entry(boft, '2311.06243', 'BOFT: inputs are rotated by butterflies, outputs scaled'),
  'fourierft': Entry(fourierft, '2405.03003', 'FourierFT: an update that is a few frequencies'),
  'switchlora': Entry(
    switchlora, '2406.06564', 'SwitchLoRA: LoRA whose vectors are switched, one after the other'
  ),
  'lamda': Entry(lamda, '2406.12832', 'LaMDA: a small square between two soon frozen factors'),
  'lamda_pp': Entry(lamda_pp, '2406.12832', 'LaMDA++: its ranks follow the singular values'),
  'paca': Entry(paca, '2503.01905', 'PaCA: some rows of every kernel, trained in place'),
  'ia3': Entry(ia3, '2205.05638', '(IA)^3: scales keys, values and inner activations'),
  'snell': Entry(snell, '2411.01800', 'SNELL: the largest entries of a kernel of two factors'),
  'snella': Entry(snella, '2510.24037', 'SNELLA: SNELL whose layers compete for their entries'),
  'pst': Entry(pst, '2205.11005', 'PST: kernels made sparse while they are trained at low rank'),
  'sct': Entry(sct, '2309.08513', 'SCT: some channels of each layer, chosen by class'),
  'spt': Entry(spt, '2303.08566', 'SPT: a budget is spent where a task is sensitive'),
  'lt_sft': Entry(lt_sft, '2110.07560', 'LT-SFT: the entries that full tuning moves the most'),
  'light_peft': Entry(
    light_peft, '2406.03792', 'Light-PEFT: heads, hidden units and ranks are pruned early'
  ),
  'loram': Entry(loram, '2502.13533', 'LoRAM: LoRA trained on a narrow model, for the whole one'),
  'loraprune': Entry(
    loraprune, '2305.18403', 'LoRAPrune: heads and hidden units are pruned while LoRA learns'
  ),
  'ssf': Entry(ssf, '2210.08823', 'SSF: a scale and a shift after every operation'),
  'houlsby': Entry(houlsby, '1902.00751', 'adapters after attention and MLP'),
  'pfeiffer': Entry(pfeiffer, '2005.00247', 'adapters after the MLP'),
  'parallel': Entry(parallel, '2110.04366', 'scaled adapters beside the MLP'),
  'mam': Entry(mam, '2110.04366', 'MAM: a prefix in attention, a scaled adapter beside the MLP'),
  'adaptformer': Entry(adaptformer, '2205.13535', 'AdaptFormer: adapters beside norm and MLP'),
  'bi_adaptformer': Entry(bi_adaptformer, '2307.16867', 'AdaptFormer with weights of one bit'),
  'dyt': Entry(dyt, '2403.11808', 'DyT: AdaptFormer, and gates that send tokens past the MLPs'),
  'vpt_shallow': Entry(vpt_shallow, '2203.12119', 'VPT: prompt tokens before the first block'),
  'vpt_deep': Entry(vpt_deep, '2203.12119', 'VPT: fresh prompt tokens before every block'),
  'e2vpt': Entry(e2vpt, '2307.13770', 'E2VPT: prompts, keys and values, and their pruning'),
  'prefix': Entry(prefix, '2101.00190', 'prefix tuning: keys and values in every attention'),
  'prompt_tuning': Entry(
    prompt_tuning, '2104.08691', 'prompt tuning: rows before the embedded words'
  ),
  'dept': Entry(dept, '2309.05173', 'DePT: a short prompt, and embedded words changed by position'),
  'velora': Entry(velora, '2405.17991', 'VeLoRA: kernels trained from projections of their inputs'),
  'meft': Entry(
    meft, '2306.00477', 'MEFT: the backbone made reversible; nothing is kept of a layer'
  ),
  's2a': Entry(s2a, '2503.08154', 'S2A: biases, prompts, side modules; 4-bit storage for backprop'),
  'lst': Entry(lst, '2206.06522', 'ladder side-tuning: a narrow network fed by the blocks'),
  'qst': Entry(
    qst,
    '2401.07159',
    'QST: a narrow decoder beside a 4-bit one, blended before the head',
    storage='nf4_double',
  ),
  'side_tuning': Entry(
    side_tuning, '1912.13503', 'side-tuning: a small network beside the frozen one'
  ),
  'head2toe': Entry(head2toe, '2201.03529', 'Head2Toe: a linear head over all activations'),
  'vqt': Entry(vqt, '2212.03220', 'VQT: learned queries summarise each block for the head'),
  'unipt': Entry(
    unipt, '2308.14316', 'UniPT: all states projected, aligned to the last, and weighed'
  ),
  'hst': Entry(hst, '2310.05393', 'HST: a pyramid beside a plain ViT'),
  'sherl': Entry(sherl, '2407.07523', 'SHERL: merged states go through the last frozen block'),
  'unipt_global': Entry(unipt_global, '2308.14316', 'UniPT of one pooled embedding, for retrieval'),
}


def register_method(
  name: str,
  make: Callable[..., Method],
  *,
  title: str,
  paper: str = '-',
  storage: str | None = None,
) -> None:
  """Makes a method known by name: to configs, the commands, `jpeft.make` and `jpeft.plan`.

  Its memory class, whether it merges and whether it trains the head follow from the rules that
  `make()` returns.

  Args:
    name: in configurations; a Python identifier.
    make: the factory. It works without arguments; its keyword arguments are the hyperparameters.
    title: what it is, in one line.
    paper: arXiv id.
    storage: the 4-bit format that it is made for, if any.

  Raises:
    ValueError: a name of jpeft's, or none that a config could use; a hyperparameter called as
      something else in the method section of a config.
    TypeError: `make()` returns no Method.
  """
  if name in REGISTRY and REGISTRY[name].module is None:
    raise ValueError(f'{name!r} is a method of jpeft: choose another name')
  if not name.isidentifier():
    raise ValueError(f'the name {name!r} of a method must be a Python identifier')
  for taken in RESERVED:
    if taken in inspect.signature(make).parameters:
      raise ValueError(
        f'{name}: no config could set the hyperparameter {taken!r}, as config.method.{taken} is '
        'something else: give it another name'
      )
  method = make()
  if not isinstance(method, Method):
    raise TypeError(f'{name}: make() must return a Method, not {type(method).__name__}')
  REGISTRY[name] = Entry(make, paper, title, storage, module_of(make))


def _takes_head(name: str) -> bool:
  """Whether the factory of a method has an argument `head`, a pattern."""
  return 'head' in inspect.signature(REGISTRY[name].make).parameters


def make(
  name: str, head: bool | str = True, saved_bits: int | None = None, **hyperparameters
) -> Method:
  """A method of the registry by name.

  Args:
    name: a key of REGISTRY.
    head: also train the model's head, for methods that do not by themselves; or the pattern that a
      factory with an argument `head` takes.
    saved_bits: of a value that the backward pass keeps of a block (`packed`), 4 or 8; None for
      whole values.
    **hyperparameters: of the method's factory; and `layers`, the layers of the model in which the
      method acts (see `in_layers`), where the factory has no argument of that name itself.

  Raises:
    ValueError: an unknown method or hyperparameter, or the pattern of a head for a method that
      takes none.
  """
  if name not in REGISTRY:
    hint = did_you_mean(name, REGISTRY)
    raise ValueError(f'no method is called {name!r}{hint} There are: {", ".join(REGISTRY)}')
  entry = REGISTRY[name]
  known = list(inspect.signature(entry.make).parameters)
  layers = None
  if 'layers' not in known:
    layers = hyperparameters.pop('layers', None)
  for key in hyperparameters:
    if key not in known:
      hint = did_you_mean(key, known)
      raise ValueError(f'{name} has no hyperparameter {key!r}{hint} It has: {", ".join(known)}')
  if isinstance(head, str):
    if not _takes_head(name):
      others = [other for other in REGISTRY if _takes_head(other)]
      raise ValueError(
        f'{name} takes no pattern of a head, and head={head!r} is one: give true or false; '
        f'patterns are for {", ".join(others)}'
      )
    hyperparameters['head'] = head
  method = entry.make(**hyperparameters)
  if layers is not None:
    method = in_layers(method, layers)
  if saved_bits is not None:
    method = chain(method, packed(bits=saved_bits))
  if head and not entry.head:
    method = chain(method, tune('{head}', name='head', memory=NO_BACKPROP, head=True))
  return method
