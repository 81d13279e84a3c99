"""Makes tests/quant/golden/bitsandbytes.npz: what bitsandbytes stores for small matrices, and what
it reads back.

Run with torch and bitsandbytes installed: python tests/quant/make_bitsandbytes_golden.py (written
with bitsandbytes 0.50.2 and torch 2.13.0, on the CPU).
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

SHAPES = {'rows': (16, 128), 'short': (33, 77), 'odd': (5, 13), 'deep': (70, 256)}  # [out, in]
FORMATS = {
  'nf4': ('nf4', False),
  'nf4_double': ('nf4', True),
  'fp4': ('fp4', False),
  'fp4_double': ('fp4', True),
}


def main():
  arrays = {}
  for seed, (name, shape) in enumerate(SHAPES.items()):
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype('float32')
    if name == 'rows':
      w[0, 64:] = 0
    arrays[f'{name}/w'] = w
    for form, (kind, double) in FORMATS.items():
      options = {'blocksize': 64, 'quant_type': kind, 'compress_statistics': double}
      packed, state = functional.quantize_4bit(torch.tensor(w), **options)
      held = state.as_dict(packed=True)
      arrays |= {f'{name}/{form}/weight.{key}': value.numpy() for key, value in held.items()}
      arrays[f'{name}/{form}/weight'] = packed.numpy()
      arrays[f'{name}/{form}/read'] = functional.dequantize_4bit(packed, state).numpy()
  np.savez_compressed(Path(__file__).parent / 'golden' / 'bitsandbytes.npz', **arrays)


if __name__ == '__main__':
  main()
