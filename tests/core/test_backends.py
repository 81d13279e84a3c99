"""Linen and NNX offer the functions that the protocol names, with its arguments."""

import inspect

import jax.numpy as jnp
import pytest

from jpeft.core.backends import linen, nnx
from jpeft.core.backends.protocol import Backend

FUNCTIONS = {name: fn for name, fn in vars(Backend).items() if inspect.isfunction(fn)}
FUNCTIONS = {name: fn for name, fn in FUNCTIONS.items() if name[0] != '_'}


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('backend', [linen, nnx], ids=['linen', 'nnx'])
def test_a_backend_offers_the_function(backend, name):
  _, *wanted = inspect.signature(FUNCTIONS[name]).parameters
  assert list(inspect.signature(getattr(backend, name)).parameters) == wanted
  assert inspect.getdoc(FUNCTIONS[name])


def test_nnx_refuses_to_write_a_cache():
  assert nnx.read_cache(None, 'rule') is None
  with pytest.raises(NotImplementedError, match='rule: NNX'):
    nnx.write_cache(None, 'rule', {'x': jnp.ones(())})
