from pathlib import Path

import pyarrow as pa
import pytest
from conftest import byte_tokenizer

from cluster.spec import parse_spec
from cluster.tables import write_table
from training.data import tokenize
from training.data_spec import DataSpec
from training.spec import TrainingSpec


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths, so that padding and counts matter; 8 do not divide them."""
    folder = tmp_path_factory.mktemp("tokens")
    rows = [{"prompt": "ab" * (i % 7 + 1), "completion": "cd" * (i % 5 + 1)} for i in range(29)]
    write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    tokenize(DataSpec(train=str(folder / "rows.parquet")), byte_tokenizer(), folder / "tokens")
    return folder / "tokens"


@pytest.fixture
def spec(tmp_path: Path) -> TrainingSpec:
    """Of a job with a store, whose base and data are never looked at."""
    return parse_spec(
        TrainingSpec,
        {
            "base_model": "/base",
            "method": {"kind": "lora"},
            "data": {"train": "/rows.arrow", "validation": 0.1},
            "output": {"name": "mine", "store": str(tmp_path / "store")},
            "workers": {"count": 2},
            "batch_size": 8,
        },
    )
