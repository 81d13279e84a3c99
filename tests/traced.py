"""What a traced program contains."""

from collections.abc import Iterator

from jax.extend import core as jex


def variables_of(jaxpr) -> Iterator:
  """The outputs of all equations of a program, with those of the programs inside it."""
  for equation in jaxpr.eqns:
    yield from equation.outvars
    for inner in jex.jaxprs_in_params(equation.params):
      yield from variables_of(inner)
