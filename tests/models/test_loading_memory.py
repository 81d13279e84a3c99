"""Kernels are coded while they are read: a folder that is too large for memory in full loads in 4
bits.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jpeft import models

# Layers of the shapes of Llama-2 7B, fewer of them.
LLAMA = {
  'model_type': 'llama',
  'hidden_size': 4096,
  'num_hidden_layers': 2,
  'num_attention_heads': 32,
  'intermediate_size': 11008,
  'vocab_size': 64,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': True,
}
LARGEST = 4096 * 11008 * 2  # bytes of the largest tensor

# Anonymous memory: the pages of a mapped file that were read are the system's to drop.
PROBE = """
import json, sys, threading, time
import jax, numpy as np
import jpeft
from jpeft.quant.formats import named

def anonymous():
  with open('/proc/self/status') as file:
    return next(1024 * int(line.split()[1]) for line in file if line.startswith('RssAnon'))

jax.block_until_ready(jax.jit(jpeft.nf4().encode)(np.ones((1024, 64), 'f')))  # compiled once
before, peak, done = anonymous(), [0], threading.Event()

def watch():
  while not done.wait(0.002):
    peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
half = {'dtype': 'bfloat16', 'param_dtype': 'bfloat16'}
options = {**half, 'scan': True, 'quantize': named(sys.argv[2])}
held = jax.block_until_ready(jpeft.load(sys.argv[1], **options).variables)
done.set()
thread.join()
print(json.dumps({'stored': jpeft.nbytes(held), 'grown': peak[0] - before}))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder, model = (
    tmp_path_factory.mktemp('llama'),
    models.from_config(LLAMA, param_dtype='bfloat16'),
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
  rng = np.random.default_rng(0)
  random = lambda x: rng.random(x.shape, np.float32).astype(x.dtype)
  models.save_pretrained(folder, model, jax.tree.map(random, shapes), LLAMA)
  return folder


@pytest.mark.slow
@pytest.mark.skipif(
  not pathlib.Path('/proc/self/status').exists(), reason='memory is read from /proc'
)
@pytest.mark.parametrize('form', ['nf4', 'int4_1'])
def test_a_folder_loads_in_its_4_bit_size_and_two_tensors(form, folder):
  done = subprocess.run(
    [sys.executable, '-c', PROBE, str(folder), form],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  told = json.loads(done.stdout)
  assert told['stored'] < (folder / 'model.safetensors').stat().st_size / 3
  assert told['stored'] / 2 < told['grown'] < told['stored'] + 2 * LARGEST
