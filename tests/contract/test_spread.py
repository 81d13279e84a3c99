"""The default run leaves no method and no backbone out."""

from jpeft import ANATOMIES
from jpeft.methods import REGISTRY
from tests.contract.table import DECODERS, DEFAULT, LINEN_SCAN, NNX_SCAN, ROWS, error_of
from tests.fixtures import BACKBONES


def test_rows_name_what_there_is():
  assert set(ROWS) <= set(REGISTRY)
  assert all({*row.cannot, *row.on} <= set(BACKBONES) for row in ROWS.values())


def test_every_method_meets_a_scan_and_a_decoder():
  for method in REGISTRY:
    mine = {b for m, b in DEFAULT if m == method}
    assert len(mine) >= min(2, sum(error_of(method, b) is None for b in BACKBONES))
    for group in (LINEN_SCAN + NNX_SCAN, DECODERS):
      assert mine & set(group) or all(error_of(method, b) for b in group), (method, group)


def test_every_backbone_meets_a_method():
  assert {backbone for _, backbone in DEFAULT} == set(BACKBONES)


def test_no_anatomy_of_a_fixture_is_left_behind():
  assert not set(ANATOMIES) & set(BACKBONES)
