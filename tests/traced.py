"""What a traced program contains."""

from collections.abc import Iterator

from jax.extend import core as jex


def equations_of(jaxpr) -> Iterator:
  """All equations of a program, with those of the programs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jex.jaxprs_in_params(equation.params):
      yield from equations_of(inner)


def variables_of(jaxpr) -> Iterator:
  """The outputs of all equations of a program, with those of the programs inside it."""
  for equation in equations_of(jaxpr):
    yield from equation.outvars
