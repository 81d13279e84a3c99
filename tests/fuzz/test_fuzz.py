"""Damaged files: each reader gives a value or one sentence, soon and within 2 GB.

A case is made of its number alone. `python -m tests.fuzz.run tests.fuzz.readers NAME NUMBER
NUMBER+1` reads it again, with a traceback where it ends the process.
"""

import random

import pytest

from tests.fuzz import faulty, watch
from tests.fuzz.readers import READERS

FEW, MANY = 100, 20_000
# Cases that once raised something else, or ended the process; a reader's cases change with its
# seeds, and then these are any cases.
ONCE = {
  'Arrow': (58, 77, 2017),
  'GGUF': (239, 5049),
  'Parquet': (1911, 2643, 4149, 15594),
  'bitsandbytes': (111, 263),
  'config.json': (10, 106, 258, 311, 461, 571, 688, 758),
  'config.json, traced': (352,),
  'logs of runs': (31, 90, 212, 284, 431),
  'npz': (4, 36, 60, 2274),
  'tokenizer.json': (3676,),
}


def test_some_damaged_files():
  jobs = [(name, 0, reader.count(FEW)) for name, reader in READERS.items()]
  jobs += [(name, case, case + 1) for name, cases in ONCE.items() for case in cases]
  told = watch.told_of(jobs)
  wrong = [line for found in told.values() for line in found.wrong]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.fuzz
@pytest.mark.parametrize('name', READERS)
def test_many_damaged_files(name):
  found = watch.watched({name: READERS[name].count(MANY)})[name]
  assert not found.wrong, '\n'.join(found.wrong)


def test_a_case_is_made_of_its_number():
  reader = READERS['tokenizer.json']
  made = [reader.damaged(random.Random(f'{reader.name} {i}')) for i in (5, 5, 6)]
  assert made[0] == made[1] != made[2]


def test_what_readers_must_not_do_is_told():
  told = watch.watched(dict.fromkeys(faulty.READERS, 2), 'tests.fuzz.faulty', seconds=2)
  found = {name: [len(kind) for kind in one[1:]] for name, one in told.items()}
  assert found == {
    'raises': [2, 0, 0, 0],
    'names nothing': [2, 0, 0, 0],
    'fills the memory': [0, 0, 2, 0],
    'ends': [0, 0, 0, 2],
    'is sound': [0, 0, 0, 0],
    'hangs': [0, 1, 0, 0],  # its first case happens to be whole
  }
