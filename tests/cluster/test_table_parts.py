"""Parts of a table, read apart, are the table: every format, on a folder and in a bucket."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.arrow_parts import IpcReader, read_batches
from cluster.errors import DataError
from cluster.store import open_store
from cluster.table_parts import TableSource, _lines
from cluster.table_rows import BadRow, encoded, values_of
from cluster.tables import write_table

ROWS: list[dict[str, Any]] = [{"id": i, "prompt": f"p{i} ü"} for i in range(23)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=9)
    else:
        write_table(pa.Table.from_pylist(rows), path)


def plain(rows: Any) -> list[dict[str, Any]]:
    return rows if isinstance(rows, list) else rows.to_pylist()


def read_all(source: TableSource, num_rows: int) -> list[Any]:
    parts = source.parts(num_rows)
    chunks = [plain(rows) for rows in source.rows(num_rows)]
    assert all(0 < len(rows) <= num_rows for rows in chunks) or "://" in source.uri
    found: list[Any] = []
    for part in parts:
        assert part.first_row == len(found)
        rows = plain(source.read(part))
        assert 0 < len(rows) == part.num_rows
        found += rows
    assert [row for rows in chunks for row in rows] == found
    assert source.num_rows() == len(found)
    return found


@pytest.mark.parametrize("num_rows", [1, 4, 9, 100])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "arrow"])
def test_parts_are_the_table(tmp_path: Path, suffix: str, num_rows: int) -> None:
    write(tmp_path / f"b.{suffix}", ROWS[10:])
    write(tmp_path / f"a.{suffix}", ROWS[:10])
    (tmp_path / "_hidden").mkdir()
    write(tmp_path / f"_hidden/c.{suffix}", ROWS)
    source = TableSource(str(tmp_path))
    assert source.columns() == ["id", "prompt"]
    assert read_all(source, num_rows) == ROWS
    assert read_all(TableSource(str(tmp_path / f"a.{suffix}")), num_rows) == ROWS[:10]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "arrow"])
def test_from_a_bucket(s3_bucket: Callable[[], str], tmp_path: Path, suffix: str) -> None:
    uri = s3_bucket()
    write(tmp_path / f"a.{suffix}", ROWS)
    open_store(uri).create(f"in/a.{suffix}", (tmp_path / f"a.{suffix}").read_bytes())
    for where in (f"{uri}/in", f"{uri}/in/a.{suffix}"):
        assert read_all(TableSource(where), 4) == ROWS


WITH_KINDS = pa.Table.from_pylist(ROWS).append_column(
    "kind", pa.array(["a", "b"] * 11 + ["a"]).dictionary_encode()
)


def ipc(kind: Any, rows_of_batch: int, compression: str | None = None) -> bytes:
    """WITH_KINDS, whose last column's text is in a dictionary, in one of Arrow's two formats."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with kind(sink, WITH_KINDS.schema, options=options) as writer:
        writer.write_table(WITH_KINDS, max_chunksize=rows_of_batch)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("rows_of_batch", [1, 4, 100])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_record_batch_is_read_alone(
    kind: Any, compression: str | None, rows_of_batch: int
) -> None:
    raw = ipc(kind, rows_of_batch, compression)
    for size in (7, 64, len(raw)):  # of the pieces in which it comes
        opened = IpcReader(raw[at : at + size] for at in range(0, len(raw), size))
        found: list[Any] = []
        for batch in opened.batches():
            data = raw[batch.start : batch.start + batch.num_bytes]
            found += (rows := read_batches(opened.head, data).to_pylist())
            assert len(rows) == batch.num_rows <= rows_of_batch
        assert found == WITH_KINDS.to_pylist()


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_from_a_bucket(s3_bucket: Callable[[], str], kind: Any) -> None:
    uri = s3_bucket()
    store = open_store(uri)
    for name, rows_of_batch in (("a", 4), ("b", 100)):
        store.create(f"in/{name}.arrow", ipc(kind, rows_of_batch))
    source = TableSource(f"{uri}/in")
    assert source.columns() == ["id", "prompt", "kind"]
    for num_rows in (3, 50):
        assert read_all(source, num_rows) == WITH_KINDS.to_pylist() * 2


def test_arrow_that_cannot_be_read_from_a_bucket_is_named(s3_bucket: Callable[[], str]) -> None:
    uri, store = (where := s3_bucket()), open_store(where)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"prompt": pa.string()})) as writer:
        for _ in range(3):
            writer.write_table(pa.table({"prompt": ["x" * 1000] * 9}))
    whole = sink.getvalue().to_pybytes()
    with pa.ipc.new_file(file := pa.BufferOutputStream(), pa.schema({"n": pa.int64()})) as writer:
        for _ in range(2):
            writer.write_table(pa.table({"n": range(9)}))
    # Cut where a message ends, which a stream may and a file must not.
    (first, _) = IpcReader(iter([file.getvalue().to_pybytes()])).batches()
    cut = file.getvalue().to_pybytes()[: first.start + first.num_bytes]
    noise = whole[:400] + bytes(range(256)) * 40
    for name, raw in {"a": b"", "b": b"nonsense", "c": b"FEA1" + b"x" * 99, "d": whole[:-9000],
                      "e": whole[:100], "f": noise, "g": cut}.items():  # fmt: skip
        store.create(f"{name}.arrow", raw)
        with pytest.raises(DataError, match=rf"{name}\.arrow: (cannot be read|has no rows)"):
            TableSource(f"{uri}/{name}.arrow").parts(10)


def test_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=3)
    assert read_all(TableSource(str(tmp_path / "saved")), 5) == ROWS


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_local_arrow_of_any_kind(tmp_path: Path, kind: Any) -> None:
    for compression in (None, "zstd"):
        (tmp_path / "a.arrow").write_bytes(ipc(kind, 4, compression))
        source = TableSource(str(tmp_path / "a.arrow"))
        assert read_all(source, 3) == read_all(source, 50) == WITH_KINDS.to_pylist()
        schema = source.schema()
        assert schema is not None
        assert schema.equals(WITH_KINDS.schema)


def test_a_folder_and_a_file_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "spark.parquet").mkdir()
    write(tmp_path / "spark.parquet/part 0 [ü].parquet", ROWS)
    assert read_all(TableSource(str(tmp_path / "spark.parquet")), 9) == ROWS
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert read_all(TableSource(str(tmp_path / "a.json")), 9) == ROWS
    (tmp_path / "a.xls").touch()
    with pytest.raises(DataError, match=r"a\.xls: unknown kind '\.xls'; use"):
        TableSource(str(tmp_path / "a.xls"))


def test_types_are_those_of_every_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS)
    write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "b.parquet")
    schema = TableSource(str(tmp_path)).schema()
    assert schema is not None
    assert schema.names == ["id", "prompt"]
    write(tmp_path / "c.arrow", [{"id": 1}])
    with pytest.raises(DataError, match=r"c\.arrow: has columns \(id int64\), a\.parquet has"):
        TableSource(str(tmp_path)).schema()
    write(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(DataError, match="only some of its files are JSONL"):
        TableSource(str(tmp_path)).schema()
    assert TableSource(str(tmp_path / "d.jsonl")).schema() is None


def test_a_large_row_group_is_not_read_over_and_over(tmp_path: Path) -> None:
    rows = {"prompt": [str(i) for i in range(1000)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert len(TableSource(str(tmp_path / "a.parquet")).parts(1)) <= 16


@given(st.lists(st.binary(max_size=4).map(lambda b: b.replace(b"x", b"\n")), max_size=8))
def test_lines_do_not_depend_on_how_bytes_arrive(chunks: list[bytes]) -> None:
    assert list(_lines(iter(chunks))) == b"".join(chunks).splitlines(keepends=True) or any(
        b"\r" in chunk or b"\x0b" in chunk for chunk in chunks
    )


def test_json_keeps_its_lines_and_tables_their_types(tmp_path: Path) -> None:
    mixed = [{"id": 1}, {"id": "two", "extra": [1]}]
    added = [(pa.field("answer", pa.string()), ["x", None])]
    suffix, data = encoded(mixed, added)
    assert suffix == ".jsonl"
    assert [json.loads(line) for line in data.splitlines()] == [
        {"id": 1, "answer": "x"}, {"id": "two", "extra": [1], "answer": None}
    ]  # fmt: skip
    suffix, data = encoded(pa.table({"id": pa.array([1, 2], pa.int8())}), added)
    assert suffix == ".parquet"
    assert pq.read_table(pa.BufferReader(data)).schema.field("id").type == pa.int8()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TableSource(str(tmp_path / "gone.parquet"))
    with pytest.raises(DataError, match=r"holds no \.parquet"):
        TableSource(str(tmp_path))
    (tmp_path / "b.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
        TableSource(str(tmp_path / "b.parquet")).parts(10)
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        TableSource(str(tmp_path / "c.jsonl")).parts(10)
    with pytest.raises(DataError, match="has no rows"):
        TableSource(str(tmp_path / "c.jsonl")).columns()


def test_a_line_that_cannot_be_read_is_one_row(tmp_path: Path) -> None:
    lines = [b"[1]", b'{"prompt": "a",\r "x": 1}', b"no", b"", b'{"prompt": "\xff"}',
             b"[" * 100_000, b'{"prompt": "b"}']  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = TableSource(str(tmp_path / "a.jsonl"))
    assert source.columns() == ["prompt", "x"]
    rows = read_all(source, 2)
    reasons = ["not a JSON object", "not JSON", "not UTF-8", "nested too deeply"]
    bad = [row.reason for row in rows if isinstance(row, BadRow)]
    assert all(reason in told for reason, told in zip(reasons, bad, strict=True))
    assert [row for row in rows if not isinstance(row, BadRow)] == [
        {"prompt": "a", "x": 1}, {"prompt": "b"}
    ]  # fmt: skip
    _, data = encoded(rows, [(pa.field("row", pa.int64()), list(range(6)))])
    assert [json.loads(line)["row"] for line in data.splitlines()] == list(range(6))


def test_text_that_is_not_utf8_harms_its_row_alone() -> None:
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    rows = pa.table({"prompt": text, "id": [0, 1, 2]})
    first, bad, last = values_of(rows, ["prompt", "absent"])
    assert (first, last) == ({"prompt": "a"}, {"prompt": "c"})
    assert isinstance(bad, BadRow)
    assert "not UTF-8" in bad.reason
    assert values_of(rows, ["id"])[1] == {"id": 1}
    encoded(rows, [])


def test_half_a_surrogate_pair_is_written_as_it_came() -> None:
    row = json.loads('{"prompt": "\\ud83d", "note": "\u00fc"}')
    _, data = encoded([row, {"note": "\u00fc"}], [])
    assert [json.loads(line) for line in data.splitlines()] == [row, {"note": "\u00fc"}]
    assert "\u00fc".encode() in data


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "arrow"])
def test_files_without_rows_are_passed_over(tmp_path: Path, suffix: str) -> None:
    write_table(pa.table({"other": pa.array([], pa.string())}), tmp_path / f"a.{suffix}")
    write(tmp_path / f"b.{suffix}", ROWS)
    source = TableSource(str(tmp_path))
    assert source.columns() == ["id", "prompt"]
    assert read_all(source, 9) == ROWS


def test_a_file_that_changed_has_another_identity(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    before = TableSource(str(tmp_path / "a.jsonl"))
    (part,) = before.parts(100)
    write(tmp_path / "a.jsonl", ROWS[::-1])
    assert TableSource(str(tmp_path / "a.jsonl")).files != before.files
    with pytest.raises(DataError, match="has changed since"):
        before.read(part)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="is gone"):
        before.read(part)
