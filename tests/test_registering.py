"""The module that a registered factory was written in."""

import functools

import jpeft
from jpeft.registering import module_of


class Callable:
  def __call__(self):
    return jpeft.nf4()


def make(double=False):
  return jpeft.nf4(double=double)


def test_functions_classes_partials_and_objects():
  partial = functools.partial(functools.partial(make, double=True))
  for factory in (make, Callable, Callable(), partial, lambda: None):
    assert module_of(factory) == __name__
