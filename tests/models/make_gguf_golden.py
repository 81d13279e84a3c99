"""Makes tests/models/golden/formats.gguf and formats.npz: each tensor format, and what the gguf
package reads in it.

Run with gguf installed: python tests/models/make_gguf_golden.py (written with gguf 0.19.0).
"""

from pathlib import Path

import gguf
import numpy as np

GOLDEN = Path(__file__).parent / 'golden'
FORMATS = ('F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q8_0')


def main():
  writer = gguf.GGUFWriter(GOLDEN / 'formats.gguf', 'llama')
  writer.add_array('some.numbers', [3, 1, 2])
  writer.add_float32('some.float', 0.25)
  writer.add_bool('some.flag', True)
  for i, name in enumerate(FORMATS):
    kind = gguf.GGMLQuantizationType[name]
    array = (
      np.random.default_rng(i).normal(size=(5, 96)) * 10.0 ** np.arange(-3, 2)[:, None]
    ).astype('float32')
    array[1, 32:64] = 0
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  read = gguf.GGUFReader(GOLDEN / 'formats.gguf').tensors
  np.savez_compressed(
    GOLDEN / 'formats.npz', **{t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in read}
  )


if __name__ == '__main__':
  main()
