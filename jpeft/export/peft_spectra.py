"""The kind of peft whose update is a few frequencies: FourierFT."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft.methods import drawn_places, fourierft

from .peft_config import FOURIERFT, count_of
from .peft_kind import Kin, Tensors, as_stored


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


FOURIERFTS = Kin(
  FOURIERFT,
  fourierft,
  {'c': 'fourierft_spectrum'},
  _fourierft_told,
  _fourierft_fields,
  _fourierft_change,
  {'count': 'n_frequency_pattern'},
  as_stored,
  as_stored,
)
