"""What the default run leaves out."""

import pathlib
import re

from tests import more

ROOT = pathlib.Path(__file__).parent.parent


def test_one_test_of_each_function_comes_before_a_second():
  seconds = {
    'tests/a.py::one[x]': 1.0,
    'tests/a.py::one[y]': 1.5,
    'tests/a.py::two': 2.0,
    'tests/a.py::three': 9.0,
    'tests/b.py::one': 3.0,
    'tests/contract/c.py::one': 20.0,
  }
  assert more.left_out(seconds, budget=3.0) == ['tests/a.py::one[y]', 'tests/a.py::three']


def test_a_measured_file_is_read_back(tmp_path):
  lines = ['0.500\ttests/a.py::one[a b]\n', '1.250\ttests/a.py::one[a b]\n']
  assert more.measured(lines) == {'tests/a.py::one[a b]': 1.25}


def test_what_is_left_out_exists():
  texts = {}
  for test in more.listed():
    module, function = more.function_of(test).split('::', 1)
    texts.setdefault(module, (ROOT / module).read_text())
    name = function.split('::')[-1]
    assert re.search(rf'def {name}\(', texts[module]), f'{test}: measure the tests again'
