"""Rows of tokens that devices share: every layout gives the numbers of one device.

For what is compared and why, see test_layout.py.
"""

import jax
import pytest

from jpeft import programs
from jpeft.core import dot_product
from tests.params import fast_if
from tests.training.decoders import (
  Shape,
  distance,
  named,
  prepared,
  trained,
  updated,
)

# Meshes are (data, model, sequence).
ROWS_OF_TEXTS = Shape(length=16, packed=True)
SHAPES = {
  'scan': ROWS_OF_TEXTS,
  'remat': Shape(length=16, packed=True, remat=True),
  'unroll': Shape(length=16, packed=True, scan=False),
  'unroll remat': Shape(length=16, packed=True, scan=False, remat=True),
  'two key heads': Shape(length=16, packed=True, kv_heads=2),
}
CELLS = [
  ('qlora', (2, 2, 2), 'sharded', 'scan'),
  ('qst', (2, 2, 2), 'sharded', 'remat'),
  ('lora', (1, 1, 8), 'replicated', 'remat'),
  ('lora', (1, 4, 2), 'sharded', 'two key heads'),
  ('lora', (4, 1, 2), 'fsdp', 'unroll remat'),
  ('qlora', (1, 1, 8), 'fsdp', 'unroll'),
  ('qlora', (4, 1, 2), 'replicated', 'remat'),
  ('qst', (1, 1, 8), 'replicated', 'scan'),
  ('qst', (4, 1, 2), 'fsdp', 'unroll'),
  ('lst', (2, 2, 2), 'fsdp', 'scan'),
  ('lst', (1, 1, 8), 'replicated', 'unroll'),
  ('lst', (4, 1, 2), 'replicated', 'remat'),
  ('saved_bits', (1, 2, 4), 'sharded', 'scan'),
  ('meft', (2, 1, 4), 'replicated', 'scan'),
  ('full', (2, 2, 2), 'fsdp', 'remat'),
]
LONG_QUICK = (('qst', (2, 2, 2), 'sharded', 'remat'), ('lora', (1, 1, 8), 'replicated', 'remat'))


@pytest.fixture
def long_contexts(monkeypatch):
  """Every context is long, and no piece of attention has all rows."""
  monkeypatch.setattr(dot_product, 'LONG', 0)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 300)


@pytest.mark.parametrize(
  ('kind', 'mesh', 'backbone', 'shape'), fast_if(lambda *cell: cell in LONG_QUICK, CELLS, named)
)
def test_long_contexts_train_as_on_one_device(kind, mesh, backbone, shape, long_contexts):
  """With several texts in a row, and padding on both sides."""
  shape = SHAPES[shape]
  program, state, arrays, layout = prepared.__wrapped__(kind, mesh, backbone, shape)
  many = updated(program, state, arrays, layout, 8, shape)
  alone = prepared.__wrapped__(kind, (1, 1), 'replicated', shape)
  one = updated(*alone, 8, shape)
  begun = updated(*alone, 0, shape)
  assert distance(many, one) < 1e-5 * distance(one, begun)
  sent = programs.collectives(program, layout.mesh.shape)
  assert any(one.kind == 'all-gather' and one.axes == ('sequence',) for one in sent)
