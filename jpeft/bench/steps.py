r"""Time and peak memory of whole training steps that run, ours and those of Hugging Face's peft.

    python -m jpeft.bench.steps [--work=w4_1b] [--cases=lora_all,qlora:block,peft.qlora:block]
        [--rounds=10] [--json]

A case is a preset of jpeft/methods/presets.py, or peft.lora_all or peft.qlora, which PyTorch,
transformers, peft and bitsandbytes run on the same shapes. Behind a colon stands what is
recomputed: block for all blocks, none if left out. Weights and texts are noise: neither time nor
memory depends on them.

Each case has a process and the device for itself. Seconds are the median over rounds of one update
(forward, backward, AdamW), after two that are not counted. The peak is what the allocator of JAX or
PyTorch has seen; on a CPU there is none. Beside ours stands what the compiled program asks for,
which `jpeft plan` shows before anything runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import cli, methods, programs, training
from jpeft.core import summary
from jpeft.messages import did_you_mean, markdown
from jpeft.models import Llama

from . import memory
from .accuracy import shown
from .works import WORKS, Work

CASES = (
  *('lora_all', 'lora_all_packed', 'lora_all:block', 'qlora', 'qlora:block', 'qst', 'lst'),
  *('peft.lora_all', 'peft.lora_all:block', 'peft.qlora', 'peft.qlora:block'),
)
PEERS = ('peft.lora_all', 'peft.qlora')
REMATS = ('none', 'block')
_UNCOUNTED = 2
_COLUMNS = ('case', 'trainable', 'seconds', 'peak MiB', 'asked for MiB')


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.steps',
    description=cli.described(__doc__),
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--work', default='w4_1b', help='of jpeft/bench/works.py, one of texts')
  parser.add_argument('--cases', default=','.join(CASES), type=lambda text: text.split(','))
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--json', action='store_true')
  parser.add_argument('--here', action='store_true', help='the one case, in this process')
  flags = parser.parse_args(argv)
  with cli.inputs_checked():
    _check(flags)
  if flags.here:
    print(json.dumps(measured(WORKS[flags.work], flags.cases[0], flags.rounds)))
    return 0
  rows = [_in_a_process(flags, case) for case in flags.cases]
  print(json.dumps(rows, indent=1) if flags.json else table(rows))
  return 0


def _check(flags) -> None:
  """Raises a ValueError for a work or a case that there is not."""
  if flags.work not in WORKS:
    raise ValueError(f'--work={flags.work} is none of {", ".join(WORKS)}')
  if flags.rounds < 1:
    raise ValueError(f'--rounds={flags.rounds} must be at least 1')
  work = WORKS[flags.work]
  known = [*PEERS, *methods.names(methods.REGISTRY)]
  for case in flags.cases:
    name, remat = parts(case)
    if name not in known:
      raise ValueError(f'--cases: {name!r} is no preset{did_you_mean(name, known)}')
    if remat not in REMATS:
      raise ValueError(f'--cases: {case!r} ends in none of {", ".join(REMATS)}')
    if name in PEERS and not isinstance(work.model(False, False), Llama):
      raise ValueError(f'--cases: {name} runs decoders such as w4_1b, and not {flags.work}')
    if name in PEERS and (work.storage or work.mlp_tokens):
      raise ValueError(f'--cases: {name} does not run {flags.work} as we do: take the plain work')


def parts(case: str) -> tuple[str, str]:
  """(preset, what is recomputed) of a case."""
  name, _, remat = case.partition(':')
  return name, remat or 'none'


def _in_a_process(flags, case: str) -> dict[str, Any]:
  """The row of a case; one that fails has the last line of what it said."""
  command = [sys.executable, '-m', 'jpeft.bench.steps', '--here', f'--work={flags.work}']
  done = subprocess.run(
    [*command, f'--cases={case}', f'--rounds={flags.rounds}'],
    env={'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', **os.environ},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    said = done.stderr.strip().splitlines() or [f'it ended with {done.returncode}']
    return {'case': case, 'failed': said[-1]}
  row = json.loads(done.stdout.splitlines()[-1])
  print(f'{case}: {row["seconds"]:.4f} s', file=sys.stderr)
  return row


def measured(work: Work, case: str, rounds: int) -> dict[str, Any]:
  """The row of a case, measured in this process."""
  name, remat = parts(case)
  measure = peer if name in PEERS else ours
  return {'case': case, **measure(work, name, remat, rounds)}


# ---- Ours.


def ours(work: Work, preset: str, remat: str, rounds: int) -> dict[str, Any]:
  """What an update of a preset takes.

  Args:
    work: its shapes; what can be stacked is scanned.
    preset: of jpeft/methods/presets.py.
    remat: of REMATS.
    rounds: updates that are counted.
  """
  scan = 'scan' in work.layers
  planned, tuned = memory.with_method(work, preset, scan, memory.REMATS[remat])
  tx = memory.adamw(tuned)
  step = planned.step(tuned, tx, training.mesh(1, 1))

  # Noise of the right dtype: made from shapes, it takes no more than the weights themselves.
  backbone = noise(planned.variables)
  batch = noise(planned.batch(work.size))
  state = training.initial_state(tuned, tx, backbone, 0)
  program = jax.jit(step, donate_argnums=0).lower(state, backbone, batch).compile()

  def update() -> None:
    nonlocal state
    state, out = program(state, backbone, batch)
    jax.block_until_ready(out)

  seconds = timed(update, rounds)
  device = jax.local_devices()[0]
  told = device.memory_stats()  # None on a CPU
  return {
    'trainable': summary(tuned).trainable,
    'seconds': seconds,
    'peak_mib': memory.mib(told['peak_bytes_in_use']) if told else None,
    'asked_mib': memory.mib(programs.memory(program).total),
    'device': device.device_kind,
  }


def noise(shapes) -> Any:
  """Arrays of such shapes: small numbers where they are floats, else bits, of which texts are 0."""
  leaves, structure = jax.tree.flatten(shapes)
  made = []
  for number, x in enumerate(leaves):
    key = jax.random.fold_in(jax.random.key(0), number)
    if jnp.issubdtype(x.dtype, jnp.floating):
      made.append(0.02 * jax.random.normal(key, x.shape, x.dtype))
    elif x.dtype == jnp.uint8:
      made.append(jax.random.bits(key, x.shape, x.dtype))
    else:
      made.append(jnp.zeros(x.shape, x.dtype))
  return jax.tree.unflatten(structure, made)


def timed(update: Callable[[], None], rounds: int) -> float:
  """The median of the seconds of some calls, after others that are not counted."""
  for _ in range(_UNCOUNTED):
    update()
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    update()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


# ---- Peers.


def peer(work: Work, name: str, remat: str, rounds: int) -> dict[str, Any]:
  """What the same update takes PyTorch with peft, and bitsandbytes for 4-bit kernels.

  Args:
    work: of a decoder, whose sizes are taken.
    name: of PEERS.
    remat: of REMATS.
    rounds: updates that are counted.

  Raises:
    ValueError: bitsandbytes has no GPU.
  """
  import torch

  on_gpu = torch.cuda.is_available()
  device = 'cuda' if on_gpu else 'cpu'
  model = _peer_model(work, name, remat, device)
  tokens = torch.zeros(work.batch(work.size)['tokens'].shape, dtype=torch.long, device=device)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3)

  def update() -> None:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if on_gpu:
      torch.cuda.synchronize()

  if on_gpu:
    torch.cuda.reset_peak_memory_stats()
  seconds = timed(update, rounds)
  return {
    'trainable': sum(p.numel() for p in trained),
    'seconds': seconds,
    'peak_mib': memory.mib(torch.cuda.max_memory_allocated()) if on_gpu else None,
    'asked_mib': None,
    'device': torch.cuda.get_device_name() if on_gpu else 'cpu',
  }


def _peer_model(work: Work, name: str, remat: str, device: str) -> Any:
  """A decoder of transformers under LoRA of peft, in bfloat16."""
  import peft
  import torch
  import transformers

  sizes = work.model(False, False)
  config = transformers.LlamaConfig(
    vocab_size=sizes.vocab,
    hidden_size=sizes.width,
    intermediate_size=sizes.mlp_dim,
    num_hidden_layers=sizes.depth,
    num_attention_heads=sizes.heads,
    num_key_value_heads=sizes.kv_heads or sizes.heads,
    tie_word_embeddings=sizes.tied,
    max_position_embeddings=work.batch(1)['tokens'].shape[1],
  )
  with torch.device(device):
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
  if name == 'peft.qlora':
    _in_4_bits(model, device)
  preset = methods.preset(name.removeprefix('peft.'))[1]
  lora = peft.LoraConfig(
    r=preset.get('rank', 8),
    lora_alpha=preset.get('alpha', 16),
    target_modules='all-linear',
    task_type='CAUSAL_LM',
  )
  model = peft.get_peft_model(model, lora)
  if remat == 'block':
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({'use_reentrant': False})
  return model.train()


def _in_4_bits(model, device: str) -> None:
  """Stores the kernels of all blocks as NF4, with scales that are coded too."""
  if device != 'cuda':
    raise ValueError('peft.qlora needs a GPU: bitsandbytes computes with 4-bit kernels there')
  import bitsandbytes as bnb
  import torch

  for block in model.model.layers:
    for parent in (block.self_attn, block.mlp):
      for name, layer in list(parent.named_children()):
        if not isinstance(layer, torch.nn.Linear):
          continue
        held = bnb.nn.Linear4bit(
          *(layer.in_features, layer.out_features, False, torch.bfloat16),
          quant_type='nf4',
          compress_statistics=True,
        )
        held.weight = bnb.nn.Params4bit(
          layer.weight.data.cpu(), requires_grad=False, quant_type='nf4', compress_statistics=True
        )
        setattr(parent, name, held.to(device))


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  cells = []
  for row in rows:
    if 'failed' in row:
      cells.append((row['case'], row['failed'], '', '', ''))
      continue
    sizes = [shown(row[name], ',.0f') for name in ('peak_mib', 'asked_mib')]
    cells.append((row['case'], f'{row["trainable"]:,}', f'{row["seconds"]:.4f}', *sizes))
  return markdown(_COLUMNS, cells)


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.steps', main))
