"""The default run leaves no method and no backbone out."""

from jpeft import ANATOMIES
from jpeft.methods import REGISTRY
from tests.contract.table import DEFAULT, ROWS, error_of
from tests.fixtures import BACKBONES


def test_rows_name_what_there_is():
  assert set(ROWS) <= set(REGISTRY)
  assert all({*row.cannot, *row.on} <= set(BACKBONES) for row in ROWS.values())


def test_every_method_meets_a_backbone():
  assert {method for method, _ in DEFAULT} == set(REGISTRY)
  assert all(error_of(*pair) is None for pair in DEFAULT)


def test_every_backbone_meets_a_method():
  assert {backbone for _, backbone in DEFAULT} == set(BACKBONES)


def test_no_anatomy_of_a_fixture_is_left_behind():
  assert not set(ANATOMIES) & set(BACKBONES)
