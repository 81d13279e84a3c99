"""At step 0: the untouched model's output or a declared start, its shapes and dtypes, the count."""

import jax

import jpeft
from jpeft import contract
from jpeft.methods import REGISTRY
from tests.contract.pair import far
from tests.contract.table import SERVED, memory_class, one_each, over, row
from tests.fixtures import BACKBONES, leaf_paths, leaves_equal

UNCHANGED = [p for p in SERVED if row(p[0]).start is not None]
CHANGED = [p for p in SERVED if row(p[0]).start is None]
EXACT = [p for p in UNCHANGED if row(p[0]).start == 0 and p[1] == 'linen_vit']


@over(UNCHANGED)
def test_the_function_starts_unchanged(pair):
  assert contract.start_fault(pair.trained[0], pair.plain, max(pair.row.start, 1e-5)) is None


@over(EXACT, always=EXACT[::4])
def test_the_function_starts_unchanged_to_the_bit_where_nothing_is_compiled(pair):
  got = pair.tuned.apply(pair.theta, pair.b.backbone, *pair.b.args, **pair.b.kwargs)
  assert leaves_equal(got, pair.b.model.apply(pair.b.backbone, *pair.b.args, **pair.b.kwargs))


@over(CHANGED)
def test_the_function_starts_elsewhere(pair):
  assert far(pair.trained[0], pair.plain) > 1e-3


@over(SERVED)
def test_output_keeps_structure_shape_and_dtype(pair):
  assert contract.output_fault(pair.trained[0], pair.plain) is None


@over(SERVED)
def test_theta_is_what_its_shapes_and_the_summary_say(pair):
  theta, tuned = pair.theta, pair.tuned
  assert jax.eval_shape(lambda: theta) == tuned.shapes
  assert set(theta) <= set(tuned.method.names)
  trained = [
    x
    for x, keep in zip(jax.tree.leaves(theta), jax.tree.leaves(tuned.trainable(theta)), strict=True)
    if keep
  ]
  table = jpeft.summary(tuned)
  assert 0 < sum(x.size for x in trained) == table.trainable
  assert {str(x.dtype) for x in trained} == {'float32'}
  assert {str(x.dtype) for x in jax.tree.leaves(theta)} <= {'float32', 'int32', 'bool'}
  assert table.total == sum(x.size for x in leaf_paths(BACKBONES[pair.b.name].backbone).values())
  assert (table.memory, table.mergeable) == (
    memory_class(pair.method, pair.b.name),
    REGISTRY[pair.method].mergeable,
  )


@over(one_each(), always=one_each())
def test_theta_is_a_function_of_the_key(pair):
  one, other = (pair.init(jax.random.key(i), pair.b.backbone) for i in (1, 2))
  assert jax.eval_shape(lambda: one) == jax.eval_shape(lambda: other)
  assert leaves_equal(one, pair.theta)
