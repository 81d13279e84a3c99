"""Makes golden/prefix.npz with torch, transformers and peft, on the two models of
golden/peft_models.npz.

Run it as `python tests/methods/make_prefix_golden.py`, after make_peft_golden.py, and with the
packages that golden/VERSIONS names; the file is committed, no test needs them.

prefix.npz, per model (bert, llama): prompt_embeddings [m, 2 * layers * kv heads * head size] as
peft saves them, the logits with them, and grad, that of sum(logits * sin(arange)) by
prompt_embeddings.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model, get_peft_model_state_dict

HERE = Path(__file__).parent / 'golden'
TOKENS = 3


def stored(name: str):
  """(the model, its inputs) as make_peft_golden.py left them."""
  with np.load(HERE / 'peft_models.npz') as held:
    found = {
      key.removeprefix(f'{name}/'): held[key] for key in held.files if key.startswith(f'{name}/')
    }
  config, cls = {
    'bert': (transformers.BertConfig, transformers.BertForSequenceClassification),
    'llama': (transformers.LlamaConfig, transformers.LlamaForCausalLM),
  }[name]
  model = cls(config(**json.loads(str(found['config']))))
  weights = {key: torch.tensor(x) for key, x in found.items() if key.startswith('weights/')}
  model.load_state_dict(
    {key.removeprefix('weights/'): x for key, x in weights.items()}, strict=False
  )
  inputs = {k: torch.tensor(found[k]).long() for k in ('input_ids', 'attention_mask') if k in found}
  logits = model.eval()(**inputs).logits.detach().numpy()
  np.testing.assert_allclose(logits, found['logits'], atol=1e-5)
  return model, inputs


def case(name: str, task: str) -> dict[str, np.ndarray]:
  torch.manual_seed(0)
  base, inputs = stored(name)
  model = get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS)).eval()
  logits = model(**inputs).logits
  (logits * torch.sin(torch.arange(logits.numel())).reshape(logits.shape)).sum().backward()
  (grad,) = [p.grad for key, p in model.named_parameters() if 'prompt_encoder' in key]
  assert grad.abs().max() > 0
  found = {
    'prompt_embeddings': get_peft_model_state_dict(model)['prompt_embeddings'],
    'logits': logits,
  }
  return {key: x.detach().numpy() for key, x in {**found, 'grad': grad}.items()}


def main():
  warnings.simplefilter('ignore')
  cases = {'bert': case('bert', 'SEQ_CLS'), 'llama': case('llama', 'CAUSAL_LM')}
  np.savez_compressed(
    HERE / 'prefix.npz',
    **{f'{name}/{key}': x for name, found in cases.items() for key, x in found.items()},
  )


if __name__ == '__main__':
  main()
