"""Tables in every format, and what is no table; the canary of an Arrow extension is not run."""

import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from cluster.tables import check_writable, open_table, write_table

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


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_table(tmp_path / "gone.arrow")
    for name in ("a.arrow", "a.parquet", "a.jsonl"):
        (tmp_path / name).write_bytes(b"\x00garbage\xff" * 10)
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            open_table(tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=name):
            open_table(tmp_path / name)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="unknown kind"):
        open_table(tmp_path / "a.csv")
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match=r"no state\.json"):
        open_table(tmp_path / "plain")
    write_table(TABLE.slice(0, 0), tmp_path / "empty.arrow")
    with pytest.raises(DataError, match="has no rows"):
        open_table(tmp_path / "empty.arrow")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        open_table(tmp_path / "a.parquet")


def test_an_arrow_extension_runs_no_code(tmp_path: Path) -> None:
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
            f"try: tables.open_table({str(path)!r})\n"
            "except errors.DataError as error: sys.exit(error.message)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "extension type, which can carry code" in result.stderr
        assert not canary.exists()


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
