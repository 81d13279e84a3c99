"""Words for people: the nearest valid choice, and tables of text."""

import difflib
import textwrap
from collections.abc import Iterable, Sequence


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
  """The known word that is most like `word`; None if none is near.

  Args:
    word: as it was given.
    known: the valid choices.
    cutoff: how near a word must be, from 0 (any) to 1 (equal); see `difflib.get_close_matches`.
  """
  found = near_words(word, known, 1, cutoff)
  return found[0] if found else None


def near_words(word: str, known: Iterable[str], count: int, cutoff: float = 0.6) -> list[str]:
  """Up to `count` known words that are like `word`, the most alike first; see `nearest`."""
  return difflib.get_close_matches(str(word), list(known), count, cutoff)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
  """ "; did you mean 'lora'?" for the end of an error message; '' if no known word is near."""
  near = nearest(word, known, cutoff)
  return '' if near is None else f'; did you mean {near!r}?'


def few(names: Iterable[str], most: int = 3) -> str:
  """The first names, and how many more there are; 'nothing' where there are none."""
  names = list(names)
  listed = ', '.join(names[:most]) or 'nothing'
  if len(names) > most:
    listed += f' and {len(names) - most} more'
  return listed


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
  """Lines of a table whose columns are padded to one width and two blanks apart.

  Args:
    rows: cells; the first row is the head.
    right: numbers of the columns that are aligned to the right.
  """
  rows = [tuple(row) for row in rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

  def padded(row: Sequence[str]) -> str:
    cells = [
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return '  '.join(cells).rstrip()

  return [padded(row) for row in rows]


def entries(rows: Sequence[tuple[str, str]], width: int, margin: str = '') -> list[str]:
  """Lines of names and what they mean, the meanings wrapped in a column of their own.

  Args:
    rows: (name, meaning).
    width: of the lines, in characters; a narrow terminal gets meanings of 30 all the same.
    margin: in front of each line.
  """
  indent = len(margin) + max(len(name) for name, _ in rows) + 2
  lines = []
  for name, meaning in rows:
    lines += textwrap.wrap(
      meaning,
      max(width, indent + 30),
      initial_indent=f'{margin}{name}'.ljust(indent),
      subsequent_indent=' ' * indent,
      break_on_hyphens=False,
    )
  return lines


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table."""
  rows = [tuple(head), *(tuple(row) for row in rows)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  rows.insert(1, tuple('-' * width for width in widths))
  lines = []
  for row in rows:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def no_row(where: str, token: str, number: int, vocabulary: int) -> str:
  """What to say of a token that a model has no row for; JAX would read NaN there.

  Args:
    where: what has the token.
    token: how it is written.
    number: its id.
    vocabulary: rows of the model's table.
  """
  return (
    f'{where} has the token {token!r} with the number {number}, and the model has rows for '
    f'{vocabulary} tokens: the tokenizer is not that of these weights, or tokens were added to it'
  )
