"""Injection points: fields of a Flax layer that replace the operation which it calls."""

import contextlib

import jax
import jax.numpy as jnp

from .grouped import grouped_dot

# The fields through which a layer multiplies by its kernel, and what it calls without them.
PRODUCTS = {
  'dot_general': jax.lax.dot_general,
  'einsum_op': jnp.einsum,
  'conv_general_dilated': jax.lax.conv_general_dilated,
  'grouped_dot': grouped_dot,
}
FIELDS = (*PRODUCTS, 'attention_fn')


def offered(module) -> tuple[str, ...]:
  """The injection points of a bound module that can be used."""
  return tuple(field for field in FIELDS if _offers(module, field))


def _offers(module, field: str) -> bool:
  # A layer with `dot_general_cls` makes its own operation and ignores `dot_general`.
  if not hasattr(module, field) or getattr(module, f'{field}_cls', None) is not None:
    return False
  if field == 'conv_general_dilated':
    # A grouped convolution is no product of all inputs with one matrix.
    return getattr(module, 'feature_group_count', 1) == 1
  return True


@contextlib.contextmanager
def inject(module, **fields):
  """Sets injection points of a module while the context lasts.

  Args:
    module: a bound module.
    **fields: such as `dot_general=fn` or `attention_fn=fn`.
  """
  before = {name: getattr(module, name) for name in fields}
  try:
    # Linen modules are frozen; NNX modules would register what is assigned.
    for name, value in fields.items():
      object.__setattr__(module, name, value)
    yield
  finally:
    for name, value in before.items():
      object.__setattr__(module, name, value)
