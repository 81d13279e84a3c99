"""The kinds of peft that change kernels in other ways than LoRA: what their folders say.

Each kind is one class: the names of its tensors, the hyperparameters that its config tells, and
what peft computes by both. peft keeps matrices as torch does, [fan_out, fan_in].
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Leaf, Method, Site, Sites, Weight
from jpeft.methods import adalora, boft, drawn_places, fourierft, hira, loha, lokr, oft

from .peft_config import (
  ADALORA,
  BOFT,
  FOURIERFT,
  HIRA,
  LOHA,
  LOKR,
  OFT,
  alpha_of,
  count_of,
  rank_of,
)

Tensors = Mapping[str, np.ndarray]
# Hyperparameters of a factory: ((name, value), ...).
Told = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Kin:
  """One kind of adapters.

  Attributes:
    kind: peft_type.
    make: the factory of the method here.
    parts: {part of theta: name of its tensor, behind that of the module}.
    told: (config, module) -> hyperparameters of the factory.
    fields: hyperparameters -> fields of the config.
    change: (tensors by parts, as stored; w [fan_out, fan_in]; hyperparameters) -> what peft
      computes in place of w.
    patterns: {hyperparameter: the field that tells other values of it for some modules}.
    ours: (tensors by parts) -> theta of one kernel.
    theirs: the inverse of `ours`.
  """

  kind: str
  make: Callable[..., Method]
  parts: Mapping[str, str]
  told: Callable[[Mapping, str], dict[str, Any]]
  fields: Callable[[Mapping], dict[str, Any]]
  change: Callable[[Tensors, np.ndarray, Mapping], np.ndarray]
  patterns: Mapping[str, str]
  ours: Callable[[Tensors, Mapping], dict[str, np.ndarray]]
  theirs: Callable[[Tensors], dict[str, np.ndarray]]

  @property
  def factory(self) -> str:
    return self.make.__name__

  def split(self, key: str) -> tuple[str, str] | None:
    """(module, part) of the name of a tensor; None if it is not of this kind."""
    for part, tensor in self.parts.items():
      if key.endswith(f'.{tensor}'):
        return key.removesuffix(f'.{tensor}'), part
    return None


@dataclasses.dataclass(frozen=True)
class Making:
  """A kind and its hyperparameters, of all kernels that share a rule."""

  kind: str
  told: Told

  @property
  def kin(self) -> Kin:
    return KIN[self.kind]

  def method(self, targets: str, name: str) -> Method:
    """The rule.

    Raises:
      ValueError: hyperparameters that its factory refuses.
    """
    return self.kin.make(targets=targets, name=name, **dict(self.told))


@dataclasses.dataclass
class Adapted:
  """What a folder says of one matrix w [fan_in, fan_out].

  Attributes:
    module: its name in the folder.
    making: the kind and the hyperparameters, by the config.
    shape: of w.
    parts: the tensors as they are stored, by parts of theta.
  """

  module: str
  making: Making
  shape: tuple[int, int]
  parts: dict[str, np.ndarray]

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w."""
    return self.making.kin.change(self.parts, w.T, dict(self.making.told)).T

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of w on which it is compared: all, since none stands for others."""
    return np.arange(self.shape[0]), np.arange(self.shape[1])

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Adapted':
    """What is said of some rows and columns of w."""
    return self

  def cut_theta(self, theta: Any, rows: np.ndarray, columns: np.ndarray) -> Any:
    """theta of a rule for some rows and columns of w."""
    return theta

  def theta(self, where: Any) -> dict[str, np.ndarray]:
    """theta of the rule for this matrix.

    Raises:
      ValueError: tensors are missing, or are of other shapes than the config says.
    """
    kin = self.making.kin
    begun = _start(self.making, self.shape)
    wanted = {part: x.shape for part, x in begun.items()}
    missing = [kin.parts[part] for part in wanted if part in kin.parts and part not in self.parts]
    if missing:
      raise ValueError(f'{where}: {self.module!r} lacks {", ".join(sorted(missing))}')
    found = kin.ours(self.parts, dict(self.making.told))
    for part, x in found.items():
      if part not in wanted or np.shape(x) != wanted[part]:
        say = f'has {list(wanted[part])}' if part in wanted else 'has no such tensor'
        raise ValueError(
          f'{where}: {self.module}.{kin.parts[part]} is {list(self.parts[part].shape)}, here '
          f'{list(np.shape(x))}, and by adapter_config.json a kernel {list(self.shape)} {say}'
        )
    return {**begun, **found}


@functools.cache
def _start(making: Making, shape: tuple[int, int]) -> dict[str, np.ndarray]:
  """theta of one kernel at the start: what is state beside the tensors stays so."""
  ((_, rule),) = making.method('', 'adapter')
  leaf = Leaf(shape, jnp.dtype('float32'), 'dot_general', ins=(0,))
  site = Site('', '', {'kernel': leaf}, {}, None, (), (), (), None, None, (), {}, Sites())
  begun = rule.init(jax.random.key(0), site, {'kernel': jnp.zeros(shape, jnp.float32)})
  return {part: np.asarray(x) for part, x in begun['kernel'].items()}


def making_of(rule: Weight) -> Making | None:
  """The kind that a rule is of, by the call that made it; None if it is of none."""
  if rule.origin is None:
    return None
  for kin in KIN.values():
    if rule.origin.factory == kin.factory:
      hyper = rule.origin.hyperparameters
      names = kin.told({}, '')
      return Making(kin.kind, tuple((name, hyper[name]) for name in names))
  return None


def config_of(modules: Mapping[str, Making]) -> dict[str, Any]:
  """The fields of the config that are of one kind, by what is told of each module.

  Raises:
    ValueError: modules differ in what a config tells of all.
  """
  makings = list(modules.values())
  common = max(makings, key=makings.count)
  told = dict(common.told)
  kin = common.kin
  fields = kin.fields(told)
  for pattern in kin.patterns.values():
    fields[pattern] = {}
  for module, making in modules.items():
    for name, value in making.told:
      if value == told[name]:
        continue
      if name not in kin.patterns:
        raise ValueError(
          f'{kin.factory} has {name}={value!r} at {module!r} and {told[name]!r} elsewhere: an '
          'adapter folder has one for all'
        )
      fields[kin.patterns[name]][module] = value
  return fields


# ---- Names and shapes: most tensors are the transposes of the parts.


def _transposed(tensors: Tensors, told: Mapping | None = None) -> dict[str, np.ndarray]:
  return {part: np.ascontiguousarray(x.T) for part, x in tensors.items()}


def _ranked(field: str):
  """(config, module) -> rank and alpha, the latter in a field of the config."""

  def told(config: Mapping, module: str) -> dict[str, Any]:
    if not config:
      return {'rank': None, 'alpha': None}
    return {'rank': rank_of(config, module), 'alpha': alpha_of(config, module, field)}

  return told


_RANKS = {'rank': 'rank_pattern', 'alpha': 'alpha_pattern'}


# ---- LoHa.


def _loha_fields(told: Mapping) -> dict[str, Any]:
  return {
    'r': told['rank'],
    'alpha': told['alpha'],
    'rank_dropout': 0.0,
    'module_dropout': 0.0,
    'use_effective_conv2d': False,
    'init_weights': True,
  }


def _loha_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  one = tensors['b1'] @ tensors['a1']
  other = tensors['b2'] @ tensors['a2']
  return w + told['alpha'] / told['rank'] * one * other


_LOHA = Kin(
  LOHA,
  loha,
  {'b1': 'hada_w1_a', 'a1': 'hada_w1_b', 'b2': 'hada_w2_a', 'a2': 'hada_w2_b'},
  _ranked('alpha'),
  _loha_fields,
  _loha_change,
  _RANKS,
  _transposed,
  _transposed,
)


# ---- LoKr.


def _lokr_told(config: Mapping, module: str) -> dict[str, Any]:
  told = _ranked('alpha')(config, module)
  factor, both = config.get('decompose_factor', -1), bool(config.get('decompose_both'))
  return {**told, 'factor': factor, 'both': both}


def _lokr_fields(told: Mapping) -> dict[str, Any]:
  own = {'decompose_both': told['both'], 'decompose_factor': told['factor']}
  return {**_loha_fields(told), **own, 'rank_dropout_scale': False}


def _lokr_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  factors = []
  for number in '12':
    if f'w{number}' in tensors:
      factors.append(tensors[f'w{number}'])
    else:
      factors.append(tensors[f'b{number}'] @ tensors[f'a{number}'])
  return w + told['alpha'] / told['rank'] * np.kron(*factors)


_LOKR = Kin(
  LOKR,
  lokr,
  {
    'w1': 'lokr_w1',
    'b1': 'lokr_w1_a',
    'a1': 'lokr_w1_b',
    'w2': 'lokr_w2',
    'b2': 'lokr_w2_a',
    'a2': 'lokr_w2_b',
  },
  _lokr_told,
  _lokr_fields,
  _lokr_change,
  _RANKS,
  _transposed,
  _transposed,
)


# ---- HiRA.


def _hira_told(config: Mapping, module: str) -> dict[str, Any]:
  return {'rank': rank_of(config, module) if config else None}


def _hira_fields(told: Mapping) -> dict[str, Any]:
  return {'r': told['rank'], 'hira_dropout': 0.0, 'fan_in_fan_out': False, 'init_weights': True}


def _hira_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  return w + w * (tensors['v'] @ tensors['u'])


_HIRA = Kin(
  HIRA,
  hira,
  {'u': 'hira_A', 'v': 'hira_B'},
  _hira_told,
  _hira_fields,
  _hira_change,
  {'rank': 'rank_pattern'},
  _transposed,
  _transposed,
)


# ---- AdaLoRA.


def _adalora_told(config: Mapping, module: str) -> dict[str, Any]:
  if not config:
    return {'rank': None, 'alpha': None}
  rank, alpha = config['init_r'], config['lora_alpha']
  return {'rank': rank, 'alpha': alpha if alpha > 0 else rank}


def _adalora_fields(told: Mapping) -> dict[str, Any]:
  return {
    'init_r': told['rank'],
    'lora_alpha': told['alpha'],
    'lora_dropout': 0.0,
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'total_step': 1,  # peft opens no folder without it
    'tinit': 0,
    'tfinal': 0,
  }


def _adalora_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  scale = told['alpha'] / (told['rank'] + 1e-5)
  return w + scale * tensors['b'] @ (tensors['e'] * tensors['a'])


def _adalora_ours(tensors: Tensors, told: Mapping) -> dict[str, np.ndarray]:
  """peft leaves out of the file what rank_pattern leaves out."""
  left_out = max(0, told['rank'] - len(tensors['a']))
  return {
    'a': np.pad(tensors['a'].T, ((0, 0), (0, left_out))),
    'e': np.pad(tensors['e'][:, 0], (0, left_out)),
    'b': np.pad(tensors['b'].T, ((0, left_out), (0, 0))),
  }


def _adalora_theirs(t: Tensors) -> dict[str, np.ndarray]:
  return {**_transposed({'a': t['a'], 'b': t['b']}), 'e': t['e'][:, None]}


_ADALORA = Kin(
  ADALORA,
  adalora,
  {'a': 'lora_A', 'e': 'lora_E', 'b': 'lora_B'},
  _adalora_told,
  _adalora_fields,
  _adalora_change,
  {},
  _adalora_ours,
  _adalora_theirs,
)


# ---- OFT.


def _oft_told(config: Mapping, module: str) -> dict[str, Any]:
  terms = 0
  if config.get('use_cayley_neumann', True):
    terms = config.get('num_cayley_neumann_terms', 5)
  return {
    'block': config.get('oft_block_size') or 32,
    'blocks': config.get('r') or None,
    'shared': bool(config.get('block_share')),
    'terms': terms,
  }


def _oft_fields(told: Mapping) -> dict[str, Any]:
  return {
    'r': told['blocks'] or 0,
    'oft_block_size': 0 if told['blocks'] else told['block'],
    'block_share': told['shared'],
    'use_cayley_neumann': told['terms'] > 0,
    'num_cayley_neumann_terms': told['terms'] or 5,
    'coft': False,
    'module_dropout': 0.0,
    'fan_in_fan_out': False,
    'init_weights': True,
    'bias': 'none',
    'peft_version': '0.18.0',  # the first that has the series so
  }


def _oft_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  q = tensors['q']
  size = int((1 + (1 + 8 * q.shape[1]) ** 0.5) / 2)
  skew = np.zeros((len(q), size, size))
  skew[:, *np.triu_indices(size, 1)] = q
  skew -= skew.swapaxes(1, 2)
  terms = told['terms']
  powers = [np.linalg.matrix_power(skew, number) for number in range(max(terms, 2))]
  if terms:
    blocks = powers[0] + 2 * sum(powers[1 : terms - 1]) + powers[terms - 1]
  else:
    blocks = (powers[0] - skew) @ np.linalg.inv(powers[0] + skew)
  return _by_blocks(w, blocks)


def _by_blocks(w: np.ndarray, blocks: np.ndarray) -> np.ndarray:
  """w [fan_out, fan_in] times the transpose of a block-diagonal matrix; one block is for all."""
  size = blocks.shape[-1]
  tiles = w.reshape(len(w), -1, size)
  blocks = np.broadcast_to(blocks, (tiles.shape[1], size, size))
  return np.einsum('obj,bij->obi', tiles, blocks).reshape(w.shape)


def _as_stored(tensors: Tensors, told: Mapping | None = None) -> dict[str, np.ndarray]:
  return dict(tensors)


_OFT = Kin(
  OFT, oft, {'q': 'oft_R.weight'}, _oft_told, _oft_fields, _oft_change, {}, _as_stored, _as_stored
)


# ---- BOFT.


def _boft_told(config: Mapping, module: str) -> dict[str, Any]:
  return {
    'block': config.get('boft_block_size', 4),
    'factors': config.get('boft_n_butterfly_factor', 1),
  }


def _boft_fields(told: Mapping) -> dict[str, Any]:
  return {
    'boft_block_size': told['block'],
    'boft_block_num': 0,
    'boft_n_butterfly_factor': told['factors'],
    'boft_dropout': 0.0,
    'fan_in_fan_out': False,
    'init_weights': True,
    'bias': 'none',
  }


def _boft_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  size = told['block']
  skew = (tensors['r'] - tensors['r'].swapaxes(-1, -2)) / 2
  for factor, q in enumerate(skew):
    blocks = (np.eye(size) - q) @ np.linalg.inv(np.eye(size) + q)
    places = np.arange(w.shape[1])
    if factor:  # every 2^(factor + 1) halves of blocks: the even ones, and the odd ones
      places = places.reshape(-1, 2**factor, 2, size // 2).swapaxes(1, 2).reshape(-1)
    turned = np.empty_like(w)
    turned[:, places] = w
    w = _by_blocks(turned, blocks)[:, places]
  return w * tensors['g']


def _boft_ours(tensors: Tensors, told: Mapping) -> dict[str, np.ndarray]:
  return {'r': tensors['r'], 'g': tensors['g'].reshape(-1)}


def _boft_theirs(t: Tensors) -> dict[str, np.ndarray]:
  return {'r': t['r'], 'g': t['g'][:, None]}


_BOFT = Kin(
  BOFT,
  boft,
  {'r': 'boft_R', 'g': 'boft_s'},
  _boft_told,
  _boft_fields,
  _boft_change,
  {},
  _boft_ours,
  _boft_theirs,
)


# ---- FourierFT.


def _fourierft_told(config: Mapping, module: str) -> dict[str, Any]:
  return {
    'count': count_of(config, module),
    'scale': config.get('scaling', 150.0),
    'seed': config.get('random_loc_seed', 777),
  }


def _fourierft_fields(told: Mapping) -> dict[str, Any]:
  return {
    'n_frequency': told['count'],
    'scaling': told['scale'],
    'random_loc_seed': told['seed'],
    'fan_in_fan_out': False,
    'init_weights': True,
    'bias': 'none',
  }


def _fourierft_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  spectrum = np.zeros(w.size)
  spectrum[drawn_places(told['seed'], w.size, told['count'])] = tensors['c']
  return w + told['scale'] * np.fft.ifft2(spectrum.reshape(w.shape)).real


_FOURIERFT = Kin(
  FOURIERFT,
  fourierft,
  {'c': 'fourierft_spectrum'},
  _fourierft_told,
  _fourierft_fields,
  _fourierft_change,
  {'count': 'n_frequency_pattern'},
  _as_stored,
  _as_stored,
)


KIN = {kin.kind: kin for kin in (_LOHA, _LOKR, _HIRA, _ADALORA, _OFT, _BOFT, _FOURIERFT)}
