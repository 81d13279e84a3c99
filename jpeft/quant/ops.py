"""The old place of `jpeft.residuals.ops`, kept for one release."""

from jpeft.residuals import (
  attention,
  coded,
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
)

__all__ = [
  'attention',
  'coded',
  'gelu',
  'gelu_tanh',
  'layer_norm',
  'quick_gelu',
  'relu',
  'rms_norm',
  'shared_layer_norm',
  'shared_rms_norm',
  'silu',
  'softmax',
]
