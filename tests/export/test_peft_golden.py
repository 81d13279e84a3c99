"""Folders that peft wrote under transformers 4.5x, whose ViT and DINOv2 have other module names."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jpeft
from tests.models.goldens import GOLDEN as MODELS
from tests.models.goldens import close, golden

GOLDEN = Path(__file__).parent / 'golden' / 'peft'
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def on_golden(name, folder, scan):
  """(the backbone, what it computes with the method of a folder, theta, tuned)."""
  loaded = jpeft.load(MODELS / name, scan=scan)
  inputs, _ = golden(name)
  method, theta = jpeft.load_adapter(folder, loaded)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  assert jax.tree.map(np.shape, theta) == jax.tree.map(np.shape, tuned.shapes)
  out = np.asarray(jax.jit(tuned.apply)(theta, loaded.variables, **inputs))
  if name == 'llama':
    out = out * inputs['mask'][..., None]
  return loaded, out, theta, tuned


@pytest.mark.parametrize('scan', (False, True))
@pytest.mark.parametrize('case', CASES)
def test_a_folder_computes_what_peft_computed(case, scan, tmp_path):
  name = case.partition('_')[0]
  loaded, out, theta, tuned = on_golden(name, GOLDEN / case, scan)
  want = np.load(GOLDEN / case / 'logits.npy')
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned, names='transformers<5')
  _, again, _, _ = on_golden(name, tmp_path, scan)
  if (
    name == 'llama'
  ):  # peft counts the padding before a text among the positions behind its prompts
    inputs, _ = golden(name)
    out, again, want = (x[inputs['mask'][:, 0] == 1] for x in (out, again, want))
  close(out, want, 1e-5)
  close(again, out, 1e-6)
  told = json.loads((tmp_path / 'adapter_config.json').read_text())
  theirs = json.loads((GOLDEN / case / 'adapter_config.json').read_text())
  assert told['peft_type'] == theirs['peft_type']
  for field in ('num_virtual_tokens', 'token_dim', 'num_attention_heads', 'num_layers'):
    assert told.get(field) == theirs.get(field)
