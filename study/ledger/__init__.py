"""The ledger: what was suggested, what was measured, how it ended. Nothing acknowledged is lost.

One driver writes, anyone reads. A write is made aside in the same folder, fsynced, renamed over,
and its folder fsynced; only then does the method return. Rows are immutable Parquet parts
`<epoch>-<sequence>-<crc32>.parquet`: the epoch is the driver's, the sequence counts the parts of
that trial, so their order needs no clock and a gap is seen. The checksum in the name covers every
byte; page checksums leave the footer open, where 3 of 12,680 flipped bits gave a wrong table
without an error.

One driver at a time: `flock` refuses a second one at once. Where locks are lost (a deleted lock
file, some network file systems) epochs fence: a driver creates `epochs/<n>.json` exclusively, then
removes the files that older drivers have written aside. A writer looks for a newer epoch after its
own file stands aside, right before the rename. So either it sees the newer epoch, or the rename
comes before the newer driver reads anything, or the rename finds its file gone.

Of a study in a store of objects the folder is the mirror; study/mirror.py says what holds there.

Damage is a LedgerError that names the file, what is wrong with it, and what to do.

    records    what the ledger holds, and its errors
    files      files that show whether they are what was written
    parts      rows as Parquet
    holding    one driver at a time: lock, epochs, fence
    reading    everything that readers may ask, whoever drives
    writing    the one writer

Each imports only from those above it.
"""

from study.ledger.files import sealed, unsealed
from study.ledger.holding import is_held, read_holder, read_jobs, refuse_if_held
from study.ledger.parts import COLUMNS, KEY, REPORTED
from study.ledger.reading import (
    count_suggestions,
    damage,
    read_answers,
    read_arms,
    read_environment,
    read_result,
    read_results,
    read_rows,
    read_spec,
    read_stints,
    read_suggestion,
    read_suggestions,
)
from study.ledger.records import (
    RETRIABLE,
    Answer,
    FencedError,
    HeldError,
    LedgerError,
    Outcome,
    Result,
    Stint,
    Suggestion,
)
from study.ledger.writing import Ledger, put_beside

__all__ = [
    "COLUMNS",
    "KEY",
    "REPORTED",
    "RETRIABLE",
    "Answer",
    "FencedError",
    "HeldError",
    "Ledger",
    "LedgerError",
    "Outcome",
    "Result",
    "Stint",
    "Suggestion",
    "count_suggestions",
    "damage",
    "is_held",
    "put_beside",
    "read_answers",
    "read_arms",
    "read_environment",
    "read_holder",
    "read_jobs",
    "read_result",
    "read_results",
    "read_rows",
    "read_spec",
    "read_stints",
    "read_suggestion",
    "read_suggestions",
    "refuse_if_held",
    "sealed",
    "unsealed",
]
