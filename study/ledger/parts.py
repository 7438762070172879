"""Rows as immutable Parquet parts `<epoch>-<sequence>-<crc32>.parquet`, and tables for pandas.

A part comes back as it was written, or not at all: the checksum in its name covers every byte, its
columns are the ledger's, and nothing in it is run while it is opened. A part that is missing leaves
a gap in the sequence.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from study.ledger.files import names_in, read_bytes
from study.ledger.records import LedgerError

RESTORE_PART = (
    "Bring it back from a copy; without one, remove the trial's folder and run the study again: "
    "that trial then starts anew"
)

# what a trial reports; `commit` adds the rest
REPORTED: dict[str, pa.DataType] = {
    "phase": pa.string(),
    "step": pa.int64(),
    "epoch": pa.float64(),
    "progress": pa.float64(),
    "metric": pa.string(),
    "value": pa.float64(),
    "goal": pa.string(),
    "unit": pa.string(),
    "seconds": pa.float64(),
}
COLUMNS: dict[str, pa.DataType] = {
    "study": pa.string(),
    "trial": pa.string(),
    "arm": pa.string(),
    "seed": pa.int64(),
    **REPORTED,
    "attempt": pa.string(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])
KEY = ["trial", "phase", "step", "metric"]

_PART = re.compile(r"(\d{6,})-(\d{6,})-[0-9a-f]{8}\.parquet")


def part_name(epoch: int, sequence: int, content: bytes) -> str:
    return f"{epoch:06d}-{sequence:06d}-{zlib.crc32(content):08x}.parquet"


def part_names(place: Path) -> list[str]:
    """The parts in the order of their commits."""
    names = [name for name in names_in(place) if name.endswith(".parquet")]
    for name in names:
        if not _PART.fullmatch(name):
            raise LedgerError(f"{place / name}: not a name the ledger gives. Move it elsewhere")
    names.sort(key=_place_of)
    # where a driver that was asleep wrote to a store after it had lost the study, the newer counts
    newest = {sequence: epoch for epoch, sequence in map(_place_of, names)}
    return [name for name in names if _place_of(name)[0] == newest[_place_of(name)[1]]]


def gap(names: list[str]) -> str | None:
    """Why the parts are not 1, 2, 3, ... in the order of their epochs; None if they are."""
    for expected, name in enumerate(names, start=1):
        if _place_of(name)[1] != expected:
            return f"part {expected} of {len(names)} or more is missing, {name} stands in its place"
    return None


def read_part(path: Path) -> pa.Table:
    content = read_bytes(path, RESTORE_PART)
    if f"{zlib.crc32(content):08x}" != path.stem[-8:]:
        what = f"{len(content)} bytes that do not fit the checksum in the name"
        raise LedgerError(f"{path}: {what}. {RESTORE_PART}")
    # Arrow's own schema may name extension types, which run code of theirs while the file is opened
    # (CVE-2026-41486), so look before Arrow does; the ledger writes no such schema.
    if b"ARROW:" in content[-8 - int.from_bytes(content[-8:-4], "little") :]:
        raise LedgerError(f"{path}: holds an Arrow schema, so no ledger wrote it. {RESTORE_PART}")
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        what = f"{len(content)} bytes, not readable as Parquet: {error}"
        raise LedgerError(f"{path}: {what}. {RESTORE_PART}") from error
    if not table.schema.equals(SCHEMA):
        what = f"its columns are not the ledger's: {', '.join(table.column_names)}"
        raise LedgerError(f"{path}: {what}. {RESTORE_PART}")
    trials = table["trial"].unique().to_pylist()
    if trials != [path.parent.parent.name]:
        raise LedgerError(f"{path}: holds rows of {', '.join(trials)}. {RESTORE_PART}")
    return _in_words_of_today(table)


def _in_words_of_today(table: pa.Table) -> pa.Table:
    """A part by version 0.1 calls `probe_gain` what is the gain over the mean filling alone.

    Told by the part itself: a study that 0.1 began may go on under another version, which writes
    both names, and a part that is measured again then adds its `probe_gain` beside the old row.
    """
    metrics = table["metric"].to_pylist()
    if "probe_gain" not in metrics or "probe_gain/mean" in metrics:
        return table
    named = ["probe_gain/mean" if name == "probe_gain" else name for name in metrics]
    place = table.schema.get_field_index("metric")
    return table.set_column(place, SCHEMA.field("metric"), pa.array(named, pa.string()))


def table_of(rows: list[dict[str, Any]], common: dict[str, Any]) -> pa.Table:
    """Rows as they are reported, each with the columns they have in common."""
    for row in rows:
        if row.keys() != REPORTED.keys():
            raise ValueError(f"a row has {sorted(REPORTED)}, got {sorted(row)}")
    try:
        table = pa.Table.from_pylist([{**row, **common} for row in rows], schema=SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"a row does not fit {REPORTED}: {error}") from error
    for name in table.column_names:
        if table[name].null_count:
            raise ValueError(f"a row of {common['trial']} has no {name!r}")
    return table


def plain_table(frame: pd.DataFrame) -> pa.Table:
    """Columns of one kind as they are; mixed ones (a label beside a number) as text."""
    columns = {}
    for name in frame.columns:
        values = [None if pd.isna(value) else value for value in frame[name]]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, None if kinds else pa.string())
    return pa.table(columns)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, store_schema=False)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _place_of(name: str) -> tuple[int, int]:
    """Epoch and sequence."""
    match = _PART.fullmatch(name)
    assert match
    return int(match[1]), int(match[2])
