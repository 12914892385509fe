"""Tables in every format, and what is no table; the canary of an Arrow extension is not run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from cluster.tables import check_writable, open_table, stream_rows, write_table

TABLE = pa.table({"prompt": ["a", "bä", ""], "n": [1, 2**53 + 1, None]})


def write_stream(path: Path) -> None:
    with pyarrow.ipc.new_stream(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet", ".jsonl"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    write_table(TABLE, path)
    found = open_table(path)
    assert found.to_pylist() == TABLE.to_pylist()
    assert found.schema.types == TABLE.schema.types
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_ipc_streams_and_saved_datasets(tmp_path: Path) -> None:
    write_stream(tmp_path / "rows.arrow")
    assert open_table(tmp_path / "rows.arrow").to_pylist() == TABLE.to_pylist()
    datasets.Dataset.from_dict(TABLE.to_pydict()).save_to_disk(tmp_path / "saved")
    assert open_table(tmp_path / "saved").to_pylist() == TABLE.to_pylist()
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict(TABLE.to_pydict())})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"several splits; name one, for example .*both/train"):
        open_table(tmp_path / "both")
    assert open_table(tmp_path / "both/train").num_rows == 3


@pytest.mark.parametrize("read", [open_table, stream_rows])
def test_bad_files_are_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "gone.arrow")
    for name in ("a.arrow", "a.parquet", "a.jsonl"):
        (tmp_path / name).write_bytes(b"\x00garbage\xff" * 10)
        with pytest.raises(DataError, match=rf"{name}: (cannot be read|.* not UTF-8)"):
            read(tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    (tmp_path / "number.jsonl").write_text("5\n")
    with pytest.raises(DataError, match=r"number\.jsonl"):
        read(tmp_path / "number.jsonl")
    (tmp_path / "deep.jsonl").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.jsonl"):
        read(tmp_path / "deep.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="unknown kind"):
        read(tmp_path / "a.csv")
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match=r"no state\.json"):
        read(tmp_path / "plain")
    write_table(TABLE.slice(0, 0), tmp_path / "empty.arrow")
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path / "empty.arrow")


def test_lines_of_json_are_counted_as_they_are_read(tmp_path: Path) -> None:
    """White space of other kinds ends no line, and a mark of the byte order is none of its text."""
    lines = ["\ufeff" + '{"a": "one"}', "", '{"a": "b\u2028\u00a0"}', "  ", '{"a": "end"}']
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    stream = stream_rows(path)
    assert stream.num_rows == 3
    assert [row["a"] for row in stream.rows(["a"])] == ["one", "b\u2028\u00a0", "end"]
    path.write_bytes('{"a": "one"}\n\u00a0\n'.encode())
    with pytest.raises(DataError, match=r"rows\.jsonl: "):
        list(stream_rows(path).rows(["a"]))
    path.write_text('[\n{"a": 1}\n]')
    with pytest.raises(DataError, match="is a JSON array; write one object a line"):
        stream_rows(path)


def test_a_folder_of_shards_is_one_table(tmp_path: Path) -> None:
    for number in range(3):
        write_table(pa.table({"a": [number, number]}), tmp_path / f"train-0000{number}.parquet")
    stream = stream_rows(tmp_path)
    assert (stream.num_rows, stream.columns) == (6, ("a",))
    assert [row["a"] for row in stream.rows(["a"])] == [0, 0, 1, 1, 2, 2]
    write_table(pa.table({"a": ["text"]}), tmp_path / "train-00003.parquet")
    with pytest.raises(
        DataError, match=r"train-00003.parquet has columns \(a string\), train-0000"
    ):
        stream_rows(tmp_path)
    (tmp_path / "train-00003.parquet").rename(tmp_path / "test-00000.parquet")
    for read in (stream_rows, open_table):
        with pytest.raises(DataError, match="holds files of test, train; put those of each"):
            read(tmp_path)


def test_a_folders_name_is_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "day=1"
    folder.mkdir()
    write_table(TABLE, folder / "rows.parquet")
    for path in (folder, folder / "rows.parquet"):
        assert open_table(path).column_names == list(stream_rows(path).columns) == ["prompt", "n"]


@pytest.mark.parametrize("read", [open_table, stream_rows])
@pytest.mark.parametrize("name", ["rows.arrow", "rows.parquet", "rows.stream", "shards/0.parquet"])
def test_two_columns_of_one_name_are_refused(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / name.replace("stream", "arrow")
    path.parent.mkdir(exist_ok=True)
    table = pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"])
    if name == "rows.stream":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        write_table(table, path)
    with pytest.raises(DataError, match="two columns are named 'completion'; rename or drop"):
        read(path.parent if name.startswith("shards") else path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        open_table(tmp_path / "a.parquet")


@pytest.mark.parametrize("reader", ["open_table", "stream_rows"])
def test_an_arrow_extension_runs_no_code(tmp_path: Path, reader: str) -> None:
    """Ray's tensor types carry a pickle in the schema's metadata and unpickle it on reading."""
    canary = tmp_path / "canary"
    bomb = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    metadata = {b"ARROW:extension:name": b"ray.data.arrow_tensor",
                b"ARROW:extension:metadata": bomb}  # fmt: skip
    field = pa.field("x", pa.list_(pa.float32()), metadata=metadata)
    table = pa.table([pa.array([[1.0]])], schema=pa.schema([field]))
    for kind in ("arrow", "parquet"):
        path = tmp_path / f"bomb.{kind}"
        if kind == "arrow":
            with pyarrow.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        else:
            pq.write_table(table, path)
        code = (
            "import sys\nfrom cluster import errors, tables\n"
            f"try: tables.{reader}({str(path)!r})\n"
            "except errors.DataError as error: sys.exit(error.message)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "extension type, which can carry code" in result.stderr
        assert not canary.exists()


@pytest.mark.parametrize(
    "kind", ["arrow", "parquet", "jsonl", "saved", "feather", "zstd.arrow", "zstd.stream.arrow"]
)
def test_a_stream_takes_no_more_memory_than_a_part_of_its_rows(tmp_path: Path, kind: str) -> None:
    """100 MB of rows, read by a process that may take 64 MB beyond its imports."""
    texts = [f"{i} " + chr(97 + i % 26) * 16_384 for i in range(6_000)]
    path, table = tmp_path / f"rows.{kind}", pa.table({"text": texts, "other": texts})
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(str(path))
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path, compression="lz4", chunksize=500)
    elif kind.startswith("zstd"):
        new = pyarrow.ipc.new_stream if "stream" in kind else pyarrow.ipc.new_file
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with new(str(path), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=500)
    else:
        write_table(table, path)
    code = (
        "import re, resource, datasets\n"
        "from pathlib import Path\n"
        "from cluster.tables import stream_rows\n"
        "status = Path('/proc/self/status').read_text()\n"
        "now = int(re.search(r'VmData:\\s+(\\d+) kB', status)[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (now + 64 * 2**20,) * 2)\n"
        f"stream = stream_rows({str(path)!r})\n"
        "print(stream.columns, stream.num_rows, sum(len(r['text']) for r in stream.rows(['text'])))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           check=False)  # fmt: skip
    expected = f"('text', 'other') 6000 {sum(map(len, texts))}"
    assert found.stdout.strip() == expected, found.stderr


def test_a_stream_reads_what_a_table_holds(tmp_path: Path) -> None:
    for kind in ("arrow", "parquet", "jsonl"):
        write_table(TABLE, tmp_path / f"rows.{kind}")
        stream = stream_rows(tmp_path / f"rows.{kind}")
        assert list(stream.rows(stream.columns)) == TABLE.to_pylist()
    lines = tmp_path / "mixed.jsonl"
    lines.write_text('{"a": "x"}\n\n{"a": 3, "b": null}\n')
    stream = stream_rows(lines)
    assert (stream.columns, stream.num_rows) == (("a", "b"), 2)
    assert list(stream.rows(["b", "a"])) == [{"b": None, "a": "x"}, {"b": None, "a": 3}]
    for line, reason in (
        (b"[1]", "line 3: is not a JSON object"),
        (b'{"a": "x', r"line 3: is not JSON: Unterminated string .*\(column 7\)"),
        (b'{"a": "\xff"}', "line 3: its text is not UTF-8"),
        (rb'{"a": "\uD83D alone"}', "line 3: its text is not UTF-8"),
    ):
        lines.write_bytes(b'{"a": "x"}\n\n' + line + b"\n")
        with pytest.raises(DataError, match=reason):
            list(stream_rows(lines).rows(["a"]))
    lines.write_bytes(rb'{"a": "\uD83D\uDE00"}')
    assert list(stream_rows(lines).rows(["a"])) == [{"a": "😀"}]


def test_outputs_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown kind"):
        check_writable(tmp_path / "out.xls")
    with pytest.raises(DataError, match="does not exist"):
        check_writable(tmp_path / "gone" / "out.arrow")


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_table(TABLE, path)
    write_table(TABLE.slice(0, 1), path)
    assert open_table(path).num_rows == 1
