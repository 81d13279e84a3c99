"""The pair of a test, shared by the tests of all its properties."""

import pytest

from tests.contract.pair import Pair, pair_of


@pytest.fixture(scope='session')
def pair(request) -> Pair:
  """Session scope makes pytest run the tests of one pair one after another."""
  return pair_of(*request.param)
