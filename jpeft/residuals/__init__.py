"""What a backward pass stores, in few bits: functions and arrays alone."""

from .compress import compressed, recomputed
from .ops import (
  PLAIN,
  attention,
  coded,
  fold,
  gelu,
  gelu_tanh,
  layer_norm,
  quick_gelu,
  relu,
  rms_norm,
  shared_layer_norm,
  shared_rms_norm,
  silu,
  softmax,
  tied,
)

__all__ = [
  'PLAIN',
  'attention',
  'coded',
  'compressed',
  'fold',
  'gelu',
  'gelu_tanh',
  'layer_norm',
  'quick_gelu',
  'recomputed',
  'relu',
  'rms_norm',
  'shared_layer_norm',
  'shared_rms_norm',
  'silu',
  'softmax',
  'tied',
]
