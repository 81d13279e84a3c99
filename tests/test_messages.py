"""Which known words are near a word that was given, and text in columns."""

from jpeft.messages import did_you_mean, entries, near_words, nearest

KNOWN = ('lora', 'lora_fa', 'dora', 'prefix')


def test_near_words_are_sorted_by_likeness_and_counted():
  assert near_words('lorra', KNOWN, 1) == ['lora'] == [nearest('lorra', KNOWN)]
  assert near_words('lorra', KNOWN, 2) == ['lora', 'lora_fa']
  assert near_words('lorra', KNOWN, 4, cutoff=0.7) == ['lora']
  assert near_words('xyz', KNOWN, 2) == []
  assert nearest('xyz', KNOWN) is None


def test_a_hint_is_the_end_of_a_sentence():
  assert did_you_mean('lorra', KNOWN) == "; did you mean 'lora'?"
  assert did_you_mean('xyz', KNOWN) == ''


def test_entries_have_two_columns_of_one_width():
  rows = [('a', 'one two three four five six seven eight'), ('longer', 'nine')]
  lines = entries(rows, 40, margin='  ')
  assert lines == [
    '  a       one two three four five six',
    '          seven eight',
    '  longer  nine',
  ]
  assert max(map(len, entries(rows, 10))) <= 38  # meanings keep 30 characters
