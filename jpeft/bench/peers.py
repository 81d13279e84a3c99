"""Rows of a peer on work w1: google/qwix 0.1.8 on the same encoder.

Compiled for TPU v5e by the same conventions, once, with jax 0.10.2 and libtpu 0.0.51, by a script
of its own (`peer_qwix_memory.py --target tpu`): a Linen encoder with qwix.LoraProvider and the same
AdamW. The numbers are constants here, which are not measured again.
"""

SOURCE = 'google/qwix, peer_qwix_memory.py'

# method, remat, trainable, MiB of arguments, MiB of temporaries, GFLOP
_ROWS = (
  ('full fine-tuning', 'none', 85_132_900, 993.0, 2164.9, 3360),
  ('full fine-tuning', 'block', 85_132_900, 993.0, 270.2, 4120),
  ('BitFit', 'none', 179_044, 182.8, 2040.5, 2289),
  ('LoRA r8 q,v', 'none', 371_812, 183.3, 2041.2, 2277),
  ('LoRA r8 all linears', 'none', 1_404_004, 189.2, 2220.5, 2327),
  ('LoRA r8 all linears', 'block', 1_404_004, 189.2, 286.5, 3105),
  ('QLoRA nf4 q,v', 'none', 371_812, 64.9, 2170.7, 2281),
  ('QLoRA nf4 all linears', 'none', 1_404_004, 70.8, 2418.8, 2331),
  ('QLoRA nf4 all linears', 'block', 1_404_004, 70.8, 343.7, 3111),
  ('QLoRA int8 all linears', 'none', 1_404_004, 108.5, 2214.9, 2328),
  ('linear probe', 'none', 76_900, 181.6, 87.0, 1119),
)

PEERS: list[dict] = [
  {
    'work': 'w1',
    'method': f'peer: {method}',
    'remat': remat,
    'layers': 'unroll',
    'trainable': trainable,
    'arguments_mib': arguments,
    'temp_mib': temp,
    'total_mib': round(arguments + temp, 1),
    'gflop': gflop,
    'target': 'tpu:v5e',
    'source': SOURCE,
  }
  for method, remat, trainable, arguments, temp, gflop in _ROWS
]
