"""Which rows of a table its picture has."""

# What a reader compares, at most fifteen: of each kind what stands for it.
COMPARED = (
  'linear',
  'lst',
  'vqt',
  'unipt',
  'sherl',
  'meft',
  'lora_packed',
  's2a',
  'bitfit',
  'lora',
  'dora',
  'adaptformer',
  'ssf',
  'vpt_deep',
  'full',
)


def compared(rows: list[dict]) -> list[dict]:
  """All rows of a short table, of a long one those of COMPARED."""
  if len(rows) <= len(COMPARED):
    return rows
  return [row for row in rows if row['method'] in COMPARED]
