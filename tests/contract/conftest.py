"""The pair of a test, shared by the tests of all its properties."""

import jax
import pytest

from tests.contract.pair import Pair, pair_of


@pytest.fixture(scope='session')
def pair(request) -> Pair:
  """Session scope makes pytest run the tests of one pair one after another."""
  kept = pair_of.cache_info()
  if kept.currsize == kept.maxsize:
    pair_of.cache_clear()
    jax.clear_caches()
  return pair_of(*request.param)
