"""A method whose theta is a function of a smaller tree."""

import dataclasses
from collections.abc import Callable, Iterable

from .generator import Generator
from .rules import Method


def generated(
  method: Method, init: Callable, expand: Callable, *, fixed: Iterable[str] = ()
) -> Method:
  """A method whose theta is made of a smaller tree, which is what is trained and stored.

  The smaller tree is {path: entries}: at the paths of the method's sites what belongs to one site,
  in a stack with its layers in front, and at '' what sites share.

  Args:
    method: what acts, such as `pfeiffer(64)`; of one name.
    init: (key, places) -> the smaller tree, with places {path: `Place`} of the entries that the
      method would start with.
    expand: (the smaller tree, places) -> {path: entries} as the method reads them, with places as
      in `init`, of shapes. It runs once a call of the model.
    fixed: entries of the smaller tree that are not trained, from the root of what is at one path.

  Raises:
    ValueError: the method has several names. At `attach`: one of both functions returns something
      else, or a rule edits its entries itself (`update`).
  """
  if len(method.names) != 1:
    raise ValueError(
      f'generated: the method has the names {", ".join(method.names)}: generate its parts one by '
      'one, or give them one name='
    )
  generator = Generator(init, expand, tuple(fixed))
  return Method(
    (pattern, dataclasses.replace(rule, generator=generator, origin=None))
    for pattern, rule in method
  )
