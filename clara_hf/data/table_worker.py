"""Reads one Parquet or Arrow file in a process of its own, and writes its rows, checked, to the standard output.

A damaged file can end the process that decodes it. Run as a script by `clara_hf.data.tables`; needs pyarrow alone.
"""

import os
import sys
from contextlib import suppress


ROWS = 128  # in one batch: twenty documents of 100 kB each make 250 MB


def batches(path: str, columns: list[str]):
    """The schema, then record batches of at most `ROWS` rows; of the named columns, or of all where it has none."""
    import pyarrow
    import pyarrow.parquet

    with open(path, "rb") as file:
        magic = file.read(6)
        file.seek(0)
        if path.lower().endswith(".parquet"):
            table = pyarrow.parquet.ParquetFile(
                file, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
            )
            wanted = [name for name in columns if name in table.schema_arrow.names] or None
            parts = table.iter_batches(ROWS, columns=wanted)
            schema = table.schema_arrow
        else:
            table = (pyarrow.ipc.open_file if magic == b"ARROW1" else pyarrow.ipc.open_stream)(file)
            wanted = [name for name in columns if name in table.schema.names] or None
            parts = (
                (table.get_batch(number) for number in range(table.num_record_batches)) if magic == b"ARROW1" else table
            )
            schema = table.schema
        yield schema if wanted is None else pyarrow.schema([schema.field(name) for name in wanted])
        for part in parts:
            part = part if wanted is None else part.select(wanted)
            part.validate(full=True)
            for start in range(0, part.num_rows, ROWS):
                yield part.slice(start, ROWS)


def main(path: str, *columns: str) -> None:
    import pyarrow

    parts = batches(path, list(columns))
    schema = next(parts)
    with os.fdopen(os.dup(1), "wb") as out, pyarrow.ipc.new_stream(out, schema) as writer:
        for part in parts:
            writer.write_batch(part)


if __name__ == "__main__":
    if os.path.abspath(sys.path[0] or ".") == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # else this folder's modules would stand before those of the libraries
    try:
        with suppress(BrokenPipeError):  # nobody reads on
            main(*sys.argv[1:])
        # All rows are out. Unloading Arrow while one of its threads still runs has aborted the interpreter at its end.
        os._exit(0)
    except (Exception, MemoryError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        sys.exit(next(iter(lines), type(error).__name__))
