"""What an adapter folder gets."""

import dataclasses
from typing import Any

import numpy as np

from .peft_kin import Making


@dataclasses.dataclass
class Content:
  """What a folder gets.

  Attributes:
    tensors: {name in the file: array}.
    kind: peft_type of the folder.
    adapted: {module: (rank, alpha)} of LoRA and DoRA.
    kin: {module: its kind and hyperparameters} of kinds with tensors of their own.
    scaled: {module: whether its outputs are scaled} of (IA)^3.
    whole: modules that are trained whole.
    norms: those of them that are norms, of LN_TUNING.
    biases: whether biases are trained of modules that are not.
    tied: whether a table changes that is the head as well.
    shared: {name in the file: array} of what belongs to no module.
    told: what the config says of that.
    tokens: {module of a table: its rows that are trained}.
  """

  kind: str
  tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  scaled: dict[str, bool] = dataclasses.field(default_factory=dict)
  kin: dict[str, Making] = dataclasses.field(default_factory=dict)
  adapted: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  whole: set[str] = dataclasses.field(default_factory=set)
  norms: set[str] = dataclasses.field(default_factory=set)
  biases: bool = False
  tied: bool = False
  shared: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  told: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
