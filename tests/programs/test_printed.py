"""Compiled programs with their text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft import planning, programs


def traced(mesh):
  """A product whose sums cross the model axis."""
  where = NamedSharding(mesh, PartitionSpec(None, 'model'))
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=where)
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda x: jnp.sin(x @ x.T), out_shardings=whole).trace(x)


def sums(text, mesh):
  return [one for one in programs.collectives_of_text(text, mesh.shape) if one.axes]


def fails(program):
  raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure')


def test_the_text_of_a_cpu():
  mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ('data', 'model'))
  program, text = programs.compiled_with_text(traced(mesh), {}, 0, 'cpu')
  assert text == program.as_text()
  (found,) = sums(text, mesh)
  assert (found.kind, found.axes, found.bytes) == ('all-reduce', ('model',), 4 * 256**2)


def test_a_program_that_cannot_be_printed_has_no_text(monkeypatch):
  monkeypatch.setattr(jax.stages.Compiled, 'as_text', fails)
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model'))
  assert programs.compiled_with_text(traced(mesh), {}, 0, 'cpu')[1] is None


@pytest.mark.aot
def test_a_tpu_program_that_jaxlib_cannot_print_is_read(monkeypatch):
  pytest.importorskip('libtpu')
  mesh = planning.target('tpu:v5e:2x2').mesh(2, 2)
  program, printed = programs.compiled_with_text(traced(mesh), {}, 0, 'tpu')
  assert printed == program.as_text()
  monkeypatch.setattr(jax.stages.Compiled, 'as_text', fails)
  _, text = programs.compiled_with_text(traced(mesh), {}, 0, 'tpu')
  assert sums(text, mesh) and sums(text, mesh) == sums(printed, mesh)
  found = programs.scheduled(text)
  assert found.cycles is None and found.moved == programs.scheduled(printed).moved > 0
