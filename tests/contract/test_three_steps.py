"""Three steps: all of theta moves, nothing of the backbone does, and nothing is compiled twice."""

import re

import jax
import numpy as np

from jpeft import contract
from tests.contract.table import SERVED, over
from tests.fixtures import leaf_paths, leaves_equal


def dead(pair) -> set[str]:
  """Paths of theta that no gradient can reach: fixed, declared, or a bias of keys."""
  free = leaf_paths(pair.tuned.trainable(pair.theta))
  patterns = (*pair.row.dead, *(f'.*?/{p}' for p in pair.b.zero_grad))
  return {p for p, train in free.items() if not train or any(re.fullmatch(q, p) for q in patterns)}


@over(SERVED)
def test_every_leaf_of_theta_moves(pair):
  before, after = leaf_paths(pair.theta), leaf_paths(pair.trained[2]['theta'])
  still = {p for p in before if np.array_equal(before[p], after[p])}
  assert still <= dead(pair)
  assert not any(np.isnan(x).any() for x in after.values())


@over(SERVED)
def test_every_leaf_of_theta_has_a_gradient(pair):
  free = {path: path not in dead(pair) for path in leaf_paths(pair.theta)}
  wanted = jax.tree.unflatten(jax.tree.structure(pair.theta), free.values())
  assert contract.gradient_fault(pair.moved[2]['theta'], wanted) is None


@over(SERVED)
def test_fixed_leaves_do_not_move(pair):
  free = leaf_paths(pair.tuned.trainable(pair.theta))
  before, after = leaf_paths(pair.theta), leaf_paths(pair.trained[2]['theta'])
  assert any(free.values())
  assert all(leaves_equal(before[p], after[p]) for p in before if not free[p])


@over(SERVED)
def test_the_backbone_gets_no_gradient_and_keeps_its_bits(pair):
  for grads in (pair.trained[1], pair.moved[2]):
    assert contract.backbone_fault(grads['backbone']) is None
  assert leaves_equal(pair.trained[2]['backbone'], pair.start['backbone'])


@over(SERVED)
def test_the_step_is_traced_once(pair):
  pair.trained, pair.moved  # noqa: B018
  assert pair.traces == 1 and pair.step._cache_size() == 1


@over(SERVED)
def test_optimizer_state_holds_nothing_of_the_backbone(pair):
  trained = sum(
    x.size
    for x, keep in zip(
      jax.tree.leaves(pair.theta), jax.tree.leaves(pair.tuned.trainable(pair.theta)), strict=True
    )
    if keep
  )
  moments = sum(x.size for x in jax.tree.leaves(pair.optimizer) if x.ndim or x.dtype == np.float32)
  assert moments == 2 * trained
