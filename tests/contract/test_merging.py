"""Merged weights are the same function, or a clear error says that there are none."""

import jax
import pytest

from jpeft import contract
from jpeft.methods import REGISTRY
from tests.contract.pair import far
from tests.contract.table import SERVED, one_each, over
from tests.fixtures import plain

MERGEABLE = [p for p in SERVED if REGISTRY[p[0]].mergeable]
OTHERS = [p for p in SERVED if not REGISTRY[p[0]].mergeable]


@over(MERGEABLE, always=one_each())
def test_the_untouched_model_runs_merged_weights_as_apply_runs_theta(pair):
  theta, out, _ = pair.moved
  merged = jax.jit(pair.tuned.merge)(theta, pair.b.backbone)
  shapes = [jax.tree.flatten(jax.tree.map(jax.typeof, tree)) for tree in (merged, pair.b.backbone)]
  assert shapes[0] == shapes[1]
  assert contract.merge_fault(plain(pair.b, merged), out) is None
  assert far(out, pair.plain) > 1e-3


@over(OTHERS)
def test_what_no_weights_express_is_an_error(pair):
  with pytest.raises(ValueError, match='cannot be merged'):
    pair.tuned.merge(pair.theta, pair.b.backbone)
