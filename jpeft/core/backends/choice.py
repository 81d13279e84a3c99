"""The backend of a model."""

from flax import nnx as flax_nnx

from . import linen, nnx


def backend_of(model):
  """The module of jpeft that knows the framework a model is written in."""
  if isinstance(model, flax_nnx.Module):
    return nnx
  if isinstance(model, linen.nn.Module):
    return linen
  raise TypeError(f'jpeft adapts Flax modules, Linen or NNX; got {type(model).__name__}')
