"""What an adapter folder holds, by our paths."""

import dataclasses
from typing import Any

import numpy as np

from .peft_kin import Adapted
from .peft_matrices import Factors, Scales, Vectors


@dataclasses.dataclass
class Folder:
  """The content of a folder, by our paths.

  Attributes:
    where: the file, for messages.
    factors: {path of an array: {layer: its factors}}.
    scales: {path of an array: {layer: its scales}}.
    vectors: {path of an array: {layer: its vectors}}.
    kin: {path of an array: {layer: what is said of it}}, of kinds with tensors of their own.
    shared: {part: tensor} of what the kernels of one kind share.
    pair: a [largest fan_in, r] and b [r, largest fan_out] that the vectors share.
    whole: {path of an array: {layer: array}} of what was trained whole.
    rows: `prompt_embeddings` of prompts and prefixes; else None.
  """

  where: Any
  factors: dict[str, dict[int, Factors]] = dataclasses.field(default_factory=dict)
  scales: dict[str, dict[int, Scales]] = dataclasses.field(default_factory=dict)
  vectors: dict[str, dict[int, Vectors]] = dataclasses.field(default_factory=dict)
  kin: dict[str, dict[int, Adapted]] = dataclasses.field(default_factory=dict)
  shared: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  pair: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  whole: dict[str, dict[int, np.ndarray]] = dataclasses.field(default_factory=dict)
  rows: np.ndarray | None = None


def matrix_in(folder: Folder, where: str) -> Any:
  """What a folder says of each layer of a matrix; None if it is trained whole."""
  for found in (folder.factors, folder.scales, folder.vectors, folder.kin):
    if where in found:
      return found[where]
  return None
