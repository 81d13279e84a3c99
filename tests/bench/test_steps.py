"""Steps that run, in the table of a GPU, here on a CPU and tiny."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft import cli
from jpeft.bench import memory, steps, works
from jpeft.models import Llama


def small(scan, remat):
  return Llama(32, 2, 4, 64, 48, kv_heads=2, tied=False, scan=scan, remat=remat, dtype=jnp.float32)


TINY = works.Work('a tiny decoder', small, works._texts(8), 2, head=False)


@pytest.mark.parametrize('case', ['lora_all', 'qlora:block', 'qst'])
def test_a_step_of_ours(case):
  row = steps.measured(TINY, case, 2)
  assert row['case'] == case and row['seconds'] > 0
  assert row['peak_mib'] is None and row['asked_mib'] > 0  # a CPU tells no peak
  name, _ = steps.parts(case)
  method, values = jpeft.methods.preset(name)
  model = small(True, False)
  tokens = jnp.zeros((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  tuned = jpeft.attach(model, jpeft.make(method, head=False, **values), shapes, tokens)
  assert row['trainable'] == jpeft.summary(tuned).trainable


def test_mlps_in_pieces_are_those_of_the_work():
  work = dataclasses.replace(TINY, mlp_tokens=4)
  _, plain = memory.with_method(TINY, 'lora_all', True, False)
  _, tuned = memory.with_method(work, 'lora_all', True, False)
  assert len(tuned.method) == len(plain.method) + 1
  assert steps.measured(work, 'lora_all', 1)['asked_mib'] > 0


def test_noise_is_of_its_dtype():
  shapes = {
    'kernel': jax.ShapeDtypeStruct((3, 4), jnp.bfloat16),
    'codes': jax.ShapeDtypeStruct((64,), jnp.uint8),
    'tokens': jax.ShapeDtypeStruct((2, 3), jnp.int32),
  }
  made = steps.noise(shapes)
  assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
    name: (x.shape, x.dtype) for name, x in shapes.items()
  }
  assert made['codes'].max() > 200 and not made['tokens'].any() and made['kernel'].any()


def test_a_case_that_fails_keeps_its_row(capsys):
  assert steps.main(['--work=w2', '--cases=bitfit', '--rounds=1', '--json']) == 0
  (row,) = json.loads(capsys.readouterr().out)
  assert row['case'] == 'bitfit' and 'none has what it adapts' in row['failed']
  assert '| bitfit ' in steps.table([row])


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--work=w99'], 'is none of w1, '),
    (['--cases=lroa_all'], "did you mean 'lora_all'"),
    (['--cases=lora_all:dotted'], 'ends in none of none, block'),
    (['--work=w1', '--cases=peft.qlora'], 'runs decoders such as w4_1b, and not w1'),
    (['--work=w4_7b_nf4', '--cases=peft.qlora'], 'does not run w4_7b_nf4 as we do'),
    (['--rounds=0'], 'must be at least 1'),
  ],
)
def test_what_there_is_not(flags, message):
  with pytest.raises(cli.Mistake, match=message):
    steps.main(flags)


@pytest.mark.parity
@pytest.mark.filterwarnings('ignore')
def test_a_step_of_peft():
  """With as many trained numbers as ours: the output layer is left out there too."""
  pytest.importorskip('peft')
  theirs = steps.measured(TINY, 'peft.lora_all:block', 2)
  mine = steps.measured(TINY, 'lora_all:block', 2)
  assert theirs['trainable'] == mine['trainable'] and theirs['seconds'] > 0
  with pytest.raises(ValueError, match='needs a GPU'):
    steps.measured(TINY, 'peft.qlora', 1)
