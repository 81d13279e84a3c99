"""Kernels are coded while they are read: a folder that is too large for memory in full loads in 4 bits."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jpeft import models

LLAMA = {'model_type': 'llama', 'hidden_size': 1024, 'num_hidden_layers': 8, 'num_attention_heads': 8,
         'intermediate_size': 4096, 'vocab_size': 64, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': True}
LARGEST = 1024 * 4096 * 4  # bytes of the largest tensor
WORK = 10 * LARGEST  # of a tensor as read, transposed, scaled, coded; what the allocator has not given back

# Anonymous memory: the pages of a mapped file that were read are the system's to drop.
PROBE = '''
import json, sys, threading, time
import jax, numpy as np
import jpeft

def anonymous():
  with open('/proc/self/status') as file:
    return next(1024 * int(line.split()[1]) for line in file if line.startswith('RssAnon'))

jax.block_until_ready(jax.jit(jpeft.nf4().encode)(np.ones((1024, 4096), 'f')))  # the compiler has been at work
before, peak, done = anonymous(), [0], threading.Event()

def watch():
  while not done.wait(0.002):
    peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
held = jax.block_until_ready(jpeft.load(sys.argv[1], scan=True, quantize=jpeft.nf4()).variables)
done.set()
thread.join()
print(json.dumps({'stored': jpeft.nbytes(held), 'grown': peak[0] - before}))
'''


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='memory is read from /proc')
def test_a_folder_loads_in_its_4_bit_size_and_the_work_on_one_tensor(tmp_path):
  model = models.from_config(LLAMA)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
  rng = np.random.default_rng(0)
  models.save_pretrained(tmp_path, model, jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes), LLAMA)
  done = subprocess.run([sys.executable, '-c', PROBE, str(tmp_path)], capture_output=True, text=True, check=False,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(sys.path)})
  assert done.returncode == 0, done.stderr[-2000:]
  told = json.loads(done.stdout)
  whole = (tmp_path / 'model.safetensors').stat().st_size
  assert told['stored'] < whole / 6
  assert told['stored'] / 2 < told['grown'] < told['stored'] + WORK < whole / 2
