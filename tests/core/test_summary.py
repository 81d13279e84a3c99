"""The table of what a method does to a model."""

import jpeft
from tests.core.small import Blocks, X, adapter, backbone, gain, low_rank

WANT = """\
site        layers  class  rule     theta                        trainable  merges
blocks/fc   3       Dense  low      kernel.a[6, 2] kernel.b[2, 6]  36         yes
blocks/fc   3       Dense  gain     kernel.l[6]                  18         yes
blocks      3       Block  adapter  down[6, 2] up[2, 6]          72         no
126 trainable numbers, 100 % of 126; full crossing; not mergeable"""


def test_a_table_of_sites_and_rules():
  model = Blocks(stack='scan')
  fixed = low_rank('.*/fc', fixed=('a',), memory='no backbone backprop')
  tuned = jpeft.attach(
    model, jpeft.chain(fixed, gain('.*/fc'), adapter('blocks')), backbone(model), X
  )
  table = jpeft.summary(tuned)
  assert [line.split() for line in str(table).splitlines()] == [
    line.split() for line in WANT.splitlines()
  ]
  assert (
    len(
      {
        line.index(c)
        for line, c in zip(
          str(table).splitlines()[:4], ('rule', 'low', 'gain', 'adapter'), strict=True
        )
      }
    )
    == 1
  )
  assert (table.trainable, table.total, table.mergeable) == (126, 126, False)


def test_the_memory_class_is_that_of_the_worst_rule():
  model = Blocks()
  rules = [
    low_rank('block_2/fc', 'one', memory=jpeft.core.rules.MEMORY_CLASSES[i]) for i in range(3)
  ]
  rules[1] = low_rank('block_1/fc', 'two', memory='partial re-entry')
  attach = lambda *rules: jpeft.summary(
    jpeft.attach(model, jpeft.chain(*rules), backbone(model), X)
  )
  assert attach(rules[0]).memory == 'no backbone backprop'
  assert attach(rules[1], rules[0]).memory == 'partial re-entry'
  assert attach(rules[2], rules[1]).memory == 'full crossing'


def test_count():
  assert jpeft.count({'a': X, 'b': [X[0], 1 * X[0, 0]]}) == 4 * 6 + 6 + 1
  assert jpeft.count({}) == 0
