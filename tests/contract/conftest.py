"""The pair of a test, shared by the tests of all its properties."""

import jax
import pytest


@pytest.fixture(scope='session')
def pair(request):
  """Session scope makes pytest run the tests of one pair one after another."""
  from tests.contract.pair import (
    pair_of,
  )  # here, since it compiles, and conftest.py of tests/ chooses how first

  kept = pair_of.cache_info()
  if kept.currsize == kept.maxsize:
    pair_of.cache_clear()
    jax.clear_caches()
  return pair_of(*request.param)
