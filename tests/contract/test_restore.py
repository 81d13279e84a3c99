"""Theta saved by Orbax, restored by another process: the same output, bit for bit."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.contract.pair import Pair
from tests.contract.restore import output
from tests.fixtures import leaf_paths, noisy

NAMES = ['lora:linen_vit_scan', 'houlsby:nnx_vit_scan']


def test_theta_in_another_process(tmp_path):
  thetas, outs = {}, {}
  for name in NAMES:
    pair = Pair(*name.split(':'))
    thetas[name] = noisy(pair.theta)
    outs[name] = output(pair, thetas[name])
    saver = ocp.StandardCheckpointer()
    saver.save(tmp_path / name / 'theta', thetas[name])
    saver.wait_until_finished()
    held = leaf_paths(saver.metadata(tmp_path / name / 'theta').item_metadata.tree)
    assert {p: x.shape for p, x in held.items()} == {
      p: x.shape for p, x in leaf_paths(thetas[name]).items()
    }
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir or '',
  }
  root = pathlib.Path(__file__).parents[2]
  subprocess.run(
    [sys.executable, '-m', 'tests.contract.restore', str(tmp_path), *NAMES],
    check=True,
    cwd=root,
    env=environment,
  )
  for name in NAMES:
    with np.load(tmp_path / name / 'out.npz') as restored:
      assert {n: y.tobytes() for n, y in restored.items()} == {
        n: y.tobytes() for n, y in outs[name].items()
      }
