"""Stages of training: after how many updates which entries are not trained."""

import dataclasses
from collections.abc import Sequence

from .rules import Rule
from .sites import Site

Rules = Sequence[tuple[Rule, Site]]


def begins(rules: Rules, steps: int) -> tuple[int, ...]:
  """After how many updates other entries are trained: 0, and when the stages of rules begin.

  Args:
    rules: with their sites.
    steps: updates in all, of which stages may be shares.

  Raises:
    ValueError: a stage that begins at the last update or after it.
  """
  found = {0}
  for rule, _ in rules:
    for when, _ in rule.stages:
      begin = _begin(when, steps)
      if begin >= steps:
        raise ValueError(
          f'{rule.name}: a stage begins after {begin} updates, and there are {steps} in all'
        )
      found.add(begin)
  return tuple(sorted(found))


def staged(rules: Rules, number: int, steps: int) -> tuple[tuple[Rule, Site], ...]:
  """The rules with what they fix after `number` of `steps` updates."""
  of_stage = {}
  for rule, _ in rules:
    fixed = rule.fixed
    for when, names in rule.stages:
      if _begin(when, steps) <= number:
        fixed = tuple(names)
    if fixed != rule.fixed:
      of_stage[id(rule)] = dataclasses.replace(rule, fixed=fixed)
  return tuple((of_stage.get(id(rule), rule), site) for rule, site in rules)


def _begin(when: float, steps: int) -> int:
  """The number of updates before a stage: `when`, or a share of all."""
  if isinstance(when, int):
    return when
  return max(1, round(when * steps))
