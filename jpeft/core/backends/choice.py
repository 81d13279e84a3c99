"""The backend of a model."""

from flax import nnx as flax_nnx

from . import linen, nnx
from .protocol import Backend


def backend_of(model) -> Backend:
  """The backend for the framework that a model is written in.

  Raises:
    TypeError: the model is neither a Linen nor an NNX module.
  """
  if isinstance(model, flax_nnx.Module):
    return nnx
  if isinstance(model, linen.nn.Module):
    return linen
  raise TypeError(f'jpeft adapts Flax modules, Linen or NNX; got {type(model).__name__}')
