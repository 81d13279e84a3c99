"""The old place of `jpeft.bench.kernels`, kept for one release."""

import runpy

if __name__ == '__main__':
  runpy.run_module('jpeft.bench.kernels', run_name='__main__')
