"""Damaged files: each reader gives a value or one sentence, soon and within 2 GB.

A case is made of its number alone. `python -m tests.fuzz.run tests.fuzz.readers NAME NUMBER
NUMBER+1` reads it again, with a traceback where it ends the process.
"""

import random

import pytest

from tests.fuzz import faulty, watch
from tests.fuzz.readers import READERS

FEW, MANY = 200, 20_000


def test_some_damaged_files():
  told = watch.watched({name: reader.count(FEW) for name, reader in READERS.items()})
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
