"""What cannot be is said at `attach`, with the way out."""

import pytest

import jpeft
from tests.contract.anatomies import described
from tests.contract.table import REFUSED, error_of, made, one_each, over, patterns, stored
from tests.fixtures import BACKBONES

# Each method meets one of the three mistakes in every run.
EACH = one_each()


def attach(backbone: str, method, name: str):
  b = stored(name, BACKBONES[backbone])
  with described(b):
    return jpeft.attach(b.model, method, b.backbone, *b.args, **b.kwargs)


@over(REFUSED, always=REFUSED, fixture='names')
def test_a_method_that_cannot_serve_a_backbone_says_so(names):
  method, backbone = names
  with pytest.raises(ValueError, match=error_of(method, backbone)):
    attach(backbone, made(method, backbone), method)


@over([p for p in EACH if patterns(p[0])], always=EACH[::3], fixture='names')
def test_a_pattern_without_a_match_names_what_is_near(names):
  method, backbone = names
  for name in patterns(method):
    with pytest.raises(ValueError, match=r'no site matches.*Near it, of \d+ sites: \w+'):
      attach(backbone, made(method, backbone, **{name: 'no/such/module'}), method)


@over(EACH, always=EACH[1::3], fixture='names')
def test_the_same_site_twice_under_one_name(names):
  method, backbone = names
  with pytest.raises(
    ValueError, match='two rules called .* meet at .*give one of the methods another name'
  ):
    attach(backbone, jpeft.chain(made(method, backbone), made(method, backbone)), method)


@over(EACH, always=EACH[2::3], fixture='names')
def test_two_of_a_kind_under_two_names(names):
  method, backbone = names
  two = jpeft.chain(made(method, backbone), made(method, backbone, name='other'))
  one = attach(backbone, made(method, backbone), method)
  if any(rule.loss for rule, _ in one.rules):
    with pytest.raises(ValueError, match='each say what training minimises'):
      attach(backbone, two, method)
    return
  both = attach(backbone, two, method)
  others = {'other'}
  if any(name.startswith(method) for name in one.shapes):  # explora has three names
    others = {name.replace(method, 'other', 1) for name in one.shapes}
  assert set(both.shapes) == {*one.shapes, *others}
  assert jpeft.count(both.shapes) == 2 * jpeft.count(one.shapes)
