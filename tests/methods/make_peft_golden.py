"""Makes golden/peft_layers.npz and golden/peft_models.npz with torch, transformers and peft.

Run it as `python tests/methods/make_peft_golden.py`; the files are committed, no test needs those
packages. golden/VERSIONS says which were used. Adapters look trained: every number of them is moved
by noise before anything is computed.

peft_layers.npz, one layer with an adapter around it:
  <case>/{x, y, weight, bias, start/<key>, adapter/<key>, grad/<key>}; grad is that of sum(y *
  sin(arange)).
peft_models.npz, whole models:
  <model>/{config, <inputs>, weights/<key>, logits}: the model without an adapter;
  <model>_<case>/{adapter/<key>, start/<key>, logits, merged}: with it, and merged into it.
"""

import copy
import json
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model, get_peft_model_state_dict

HERE = Path(__file__).parent / 'golden'
PREFIX = 'base_model.model.'


def moved(module, size):
  """Adds noise to all parameters that are trained."""
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.requires_grad:
        parameter += size * torch.randn_like(parameter)
  return module


def arrays(tensors):
  return {
    key.removeprefix(PREFIX): tensor.detach().numpy().copy() for key, tensor in tensors.items()
  }


def flat(prefix, tree):
  """{'prefix/key': array} of a tree of dicts; integers as int32."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out |= flat(f'{prefix}/{key}', value)
    else:
      value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
      out[f'{prefix}/{key}'] = value.astype(np.int32) if value.dtype == np.int64 else value
  return out


class One(torch.nn.Module):
  def __init__(self, layer):
    super().__init__()
    self.layer = layer

  def forward(self, x):
    return self.layer(x)


def layers():
  linear, conv = (lambda: torch.nn.Linear(6, 5)), (lambda: torch.nn.Conv2d(3, 4, (3, 2), (2, 1), 1))
  table = lambda: torch.nn.Embedding(7, 6)
  lora = lambda **kw: LoraConfig(r=2, lora_alpha=3, target_modules=['layer'], **kw)
  ia3 = lambda *inputs: IA3Config(target_modules=['layer'], feedforward_modules=list(inputs))
  cases = {
    'linear_lora': (linear, lora()),
    'linear_rslora': (linear, lora(use_rslora=True)),
    'linear_gaussian': (linear, lora(init_lora_weights='gaussian')),
    'linear_pissa': (linear, lora(init_lora_weights='pissa')),
    'linear_olora': (linear, lora(init_lora_weights='olora')),
    'linear_dora': (linear, lora(use_dora=True)),
    'linear_ia3_out': (linear, ia3()),
    'linear_ia3_in': (linear, ia3('layer')),
    'conv_lora': (conv, lora()),
    'conv_dora': (conv, lora(use_dora=True)),
    'conv_ia3_out': (conv, ia3()),
    'conv_ia3_in': (conv, ia3('layer')),
    'table_lora': (table, lora()),
  }
  out = {}
  for name, (make, config) in cases.items():
    torch.manual_seed(len(out))
    net = One(make())
    base = {key.removeprefix('layer.'): value for key, value in arrays(net.state_dict()).items()}
    x = {
      'linear': torch.randn(2, 3, 6),
      'conv': torch.randn(2, 3, 7, 6),
      'table': torch.tensor([[0, 3, 3], [6, 1, 2]]),
    }[name.split('_')[0]]
    net = get_peft_model(net, config)
    start = arrays(get_peft_model_state_dict(net))
    y = moved(net, 0.5).eval()(x)
    (y * torch.sin(torch.arange(y.numel())).reshape(y.shape)).sum().backward()
    grads = {key: p.grad for key, p in net.named_parameters() if p.requires_grad}
    grads = {
      key.removeprefix(PREFIX).replace('.default', ''): g.numpy() for key, g in grads.items()
    }
    adapter = arrays(get_peft_model_state_dict(net))
    out |= flat(name, base | {'x': x, 'y': y, 'start': start, 'adapter': adapter, 'grad': grads})
  return out


def bert():
  config = transformers.BertConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=10,
    num_labels=3,
  )
  tokens, mask = torch.randint(0, 24, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
  mask[1, 5:] = 0
  inputs = {'input_ids': tokens, 'attention_mask': mask}
  linear = r'.*layer\.\d+\..*(query|key|value|dense)'
  cases = {
    'lora': LoraConfig(
      r=4,
      lora_alpha=8,
      target_modules=['query', 'value'],
      rank_pattern={'value': 2},
      alpha_pattern={'value': 6},
    ),
    'rslora': LoraConfig(r=3, lora_alpha=5, target_modules=linear, use_rslora=True),
    'pissa': LoraConfig(
      r=2, lora_alpha=5, target_modules=['query', 'intermediate.dense'], init_lora_weights='pissa'
    ),
    'dora': LoraConfig(
      r=2, lora_alpha=4, target_modules=['query', 'value', 'intermediate.dense'], use_dora=True
    ),
    'word': LoraConfig(r=2, lora_alpha=4, target_modules=['word_embeddings']),
    'vera': VeraConfig(r=3, target_modules=['query', 'intermediate.dense'], projection_prng_key=0),
    'ia3': IA3Config(
      target_modules=['key', 'value', 'output.dense'], feedforward_modules=['output.dense']
    ),
  }
  return transformers.BertForSequenceClassification(config), inputs, cases


def llama():
  config = transformers.LlamaConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    rms_norm_eps=1e-6,
    rope_parameters={'rope_type': 'default', 'rope_theta': 10_000.0},
    tie_word_embeddings=False,
  )
  inputs = {'input_ids': torch.randint(0, 24, (2, 7))}
  cases = {
    'lora': LoraConfig(r=2, lora_alpha=4, target_modules='all-linear', task_type='CAUSAL_LM'),
    'dora': LoraConfig(
      r=2, lora_alpha=4, target_modules=['q_proj', 'v_proj', 'down_proj'], use_dora=True
    ),
    'ia3': IA3Config(
      target_modules=['k_proj', 'v_proj', 'down_proj'], feedforward_modules=['down_proj']
    ),
  }
  return transformers.LlamaForCausalLM(config), inputs, cases


def models():
  out = {}
  for make in (bert, llama):
    torch.manual_seed(0)
    base, inputs, cases = make()
    base = moved(base, 0.2).eval()
    weights, run = arrays(base.state_dict()), lambda model, inputs=inputs: model(**inputs).logits
    settings = json.dumps(base.config.to_dict(), sort_keys=True)
    out |= flat(
      make.__name__, {'config': settings, **inputs, 'weights': weights, 'logits': run(base)}
    )
    for name, config in cases.items():
      model = get_peft_model(copy.deepcopy(base), config)
      start = arrays(get_peft_model_state_dict(model))
      model = moved(model, 0.3).eval()
      found = {'adapter': arrays(get_peft_model_state_dict(model)), 'logits': run(model)}
      if name == 'pissa':  # elsewhere the start is zeros, ones and random numbers
        found['start'] = start
      found['merged'] = run(model.merge_and_unload())
      out |= flat(f'{make.__name__}_{name}', found)
  return out


def main():
  warnings.simplefilter('ignore')
  HERE.mkdir(exist_ok=True)
  for name, make in {'peft_layers': layers, 'peft_models': models}.items():
    with torch.enable_grad():
      np.savez_compressed(HERE / f'{name}.npz', **make())
  versions = {name: metadata.version(name) for name in ('torch', 'transformers', 'peft', 'numpy')}
  (HERE / 'VERSIONS').write_text(
    ''.join(f'{name} {version}\n' for name, version in versions.items())
  )


if __name__ == '__main__':
  main()
