"""The kinds of peft that change kernels in other ways than LoRA, and what folders of them say."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Leaf, Method, Place, Site, Sites, Weight

from .peft_bases import RANDLORAS, VBLORAS
from .peft_kind import Kin, Told
from .peft_low_rank import ADALORAS, HIRAS, LOHAS, LOKRS
from .peft_rotations import BOFTS, OFTS
from .peft_spectra import FOURIERFTS

_ALL = LOHAS, LOKRS, HIRAS, ADALORAS, OFTS, BOFTS, FOURIERFTS, VBLORAS, RANDLORAS
KIN = {kin.kind: kin for kin in _ALL}


@dataclasses.dataclass(frozen=True)
class Making:
  """A kind and its hyperparameters, of all kernels that share a rule."""

  kind: str
  told: Told

  @property
  def kin(self) -> Kin:
    return KIN[self.kind]

  def method(self, targets: str, name: str, **given) -> Method:
    """The rule, with further hyperparameters that no config tells.

    Raises:
      ValueError: hyperparameters that its factory refuses.
    """
    return self.kin.make(targets=targets, name=name, **dict(self.told), **given)


@dataclasses.dataclass
class Adapted:
  """What a folder says of one matrix w [fan_in, fan_out].

  Attributes:
    module: its name in the folder.
    making: the kind and the hyperparameters, by the config.
    shape: of w.
    parts: the tensors as they are stored, by parts of theta.
    shared: the tensors that all kernels share, by parts.
  """

  module: str
  making: Making
  shape: tuple[int, int]
  parts: dict[str, np.ndarray]
  shared: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w."""
    tensors = {**self.parts, **self.shared}
    return self.making.kin.change(tensors, w.T, dict(self.making.told)).T

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of w on which it is compared: all, since none stands for others."""
    return np.arange(self.shape[0]), np.arange(self.shape[1])

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Adapted':
    """What is said of some rows and columns of w."""
    return self

  def cut_theta(self, theta: Any, rows: np.ndarray, columns: np.ndarray) -> Any:
    """theta of a rule for some rows and columns of w."""
    return theta

  def read(self, t: Any) -> Any:
    """What the rule reads, of theta of this matrix as it is trained."""
    shared = self.making.kin.shared
    if shared is None:
      return t
    return shared.expand(t, self.shared, dict(self.making.told))

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
  key = jax.random.key(0)
  begun = rule.init(key, site, {'kernel': jnp.zeros(shape, jnp.float32)})
  if rule.generator is not None:
    begun = rule.generator.start('adapter', key, {'kernel': Place(site, begun)})['kernel']
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
