"""Embeddings beside the shards of a table, against the encoder asked directly."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import WriterProperties, write_deltalake

from mdm_core.errors import ConfigError, WorkError
from pipelines.data.table.sample_table import SampleTable, row_group_sizes
from pipelines.embed.config import EmbedConfig
from pipelines.embed.pipeline import EmbedReport, embed
from pipelines.embed.store import EmbeddingStore, encoder_slug
from pipelines.text_encoder import load_text_encoder

CAPTIONS = [f"picture number {index} of {'a fox' if index % 3 else 'a lighthouse by the sea'}" for index in range(12)]


def add_rows(uri: Path, captions: list[str], outcome: str = "ok", row_group_rows: int = 100) -> None:
    """Appends one shard through Delta's own writer."""
    count = len(captions)
    values = {
        "id": [f"{outcome}{caption}".encode()[-16:].rjust(16) for caption in captions],
        "url": [f"http://example.com/{caption}" for caption in captions],
        "caption": captions,
        "source": ["test"] * count,
        "outcome": [outcome] * count,
        "retryable": [False] * count,
        "attempts": [1] * count,
        "fetched_at": [0] * count,
    }
    columns = {field.name: pa.array(values.get(field.name, [None] * count), field.type) for field in SampleTable.SCHEMA}
    rows = pa.table(columns, schema=SampleTable.SCHEMA)
    properties = WriterProperties(max_row_group_size=row_group_rows)
    write_deltalake(str(uri), rows, partition_by=["outcome"], mode="append", writer_properties=properties)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, EmbedReport]:
    """A table of three shards with embeddings, and the report of the run that made them."""
    uri = tmp_path_factory.mktemp("embedded") / "table"
    for first in range(0, 12, 4):
        add_rows(uri, CAPTIONS[first : first + 4], row_group_rows=3 if first == 4 else 100)
    add_rows(uri, ["not", "kept"], outcome="failed")
    # Left by nobody knows what: there is no encoder.json beside it, so it must be made again.
    stale = uri / "_embeddings/minilm" / SampleTable.open(str(uri)).shards("ok")[0].path
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    return uri, embed(EmbedConfig(table=str(uri), max_tokens=8, workers=2))


@pytest.fixture
def table_uri(embedded: tuple[Path, EmbedReport], tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded[0], tmp_path / "table"))


def test_each_shard_is_mirrored_row_by_row(embedded: tuple[Path, EmbedReport]) -> None:
    uri, report = embedded
    assert (report.embedded_shards, report.embedded_rows, report.rows) == (3, 12, 12)
    table = SampleTable.open(str(uri))
    assert (report.encoder, report.width, report.max_tokens) == ("minilm", 384, 8)
    assert report.table_version == table.version == 3

    store = EmbeddingStore.open(table, "minilm", max_tokens=8)
    encoder = load_text_encoder("minilm", max_tokens=8)
    captions = []
    for shard in table.shards("ok"):
        rows = table.read(shard, ["id", "caption"])
        captions += rows["caption"].to_pylist()
        embeddings = store.read(shard)
        for caption, got in zip(rows["caption"].to_pylist(), embeddings, strict=True):
            wanted = encoder.encode([caption])[0].astype(np.float32)
            assert got.dtype == np.float16
            np.testing.assert_allclose(got.astype(np.float32), wanted, atol=4e-3, err_msg=caption)
        path = uri / "_embeddings/minilm" / shard.path
        row_groups = [row_group_sizes(pq.ParquetFile(name)) for name in (uri / shard.path, path)]
        assert row_groups[0] == row_groups[1] == ([3, 1] if "number 4 " in rows["caption"][0].as_py() else [4])
        for first, count in ((0, 4), (1, 2), (3, 1), (2, 0)):
            ids, some = store.read_rows(shard, first, count)
            assert ids == rows["id"].to_pylist()[first : first + count]
            assert [one.tobytes() for one in some] == [one.tobytes() for one in embeddings[first : first + count]]
        file = pq.read_table(path, partitioning=None)
        assert file["id"].to_pylist() == rows["id"].to_pylist()
        assert file["num_tokens"].to_pylist() == [len(one) for one in embeddings]
        assert file.schema.field("embedding").type.value_type == pa.float16()
        metadata = {key: file.schema.metadata[key] for key in (b"encoder", b"width", b"max_tokens")}
        assert metadata == {b"encoder": b"minilm", b"width": b"384", b"max_tokens": b"8"}
    assert sorted(captions) == sorted(CAPTIONS)


def test_only_what_is_missing_is_embedded(table_uri: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EmbedConfig(table=str(table_uri), max_tokens=8)
    files = {path: path.stat().st_mtime_ns for path in (table_uri / "_embeddings").rglob("*.parquet")}
    assert len(files) == 3
    with monkeypatch.context() as without_ray:
        without_ray.setattr("pipelines.cluster.connect", None)
        again = embed(config)
    assert (again.embedded_shards, again.embedded_rows, again.rows) == (0, 0, 12)

    add_rows(table_uri, ["a new one"])
    with pytest.raises(ConfigError, match=r"1 of 4 shards .* at version 4 have no embeddings by minilm; run `mdm emb"):
        EmbeddingStore.open(SampleTable.open(str(table_uri)), "minilm")
    assert EmbeddingStore.open(SampleTable.open(str(table_uri), 3), "minilm").width == 384
    report = embed(config)
    assert (report.embedded_shards, report.embedded_rows, report.table_version) == (1, 1, 4)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert EmbeddingStore.open(SampleTable.open(str(table_uri)), "minilm").max_tokens == 8


def test_an_encoder_that_can_t_be_loaded_is_the_message_itself(table_uri: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the text encoder t5:/no/such can't be loaded") as caught:
        embed(EmbedConfig(table=str(table_uri), encoder="t5:/no/such"))
    assert "Traceback" not in str(caught.value)


def test_another_cut_is_refused_with_the_fix(table_uri: Path) -> None:
    message = r"have max_tokens=8, wanted 9; ask for max_tokens=8, or delete"
    with pytest.raises(ConfigError, match=message):
        embed(EmbedConfig(table=str(table_uri), max_tokens=9))
    with pytest.raises(ConfigError, match=message):
        EmbeddingStore.open(SampleTable.open(str(table_uri)), "minilm", max_tokens=9)


def test_a_file_that_does_not_fit_its_shard_is_named(table_uri: Path) -> None:
    table = SampleTable.open(str(table_uri))
    shard = table.shards("ok")[0]
    path = table_uri / "_embeddings/minilm" / shard.path
    pq.write_table(pq.read_table(path, partitioning=None).slice(1), path)
    with pytest.raises(WorkError, match=r"holds 3 rows, wanted 4 rows; delete it and run `mdm embed` again"):
        EmbeddingStore.open(table, "minilm").read(shard)


def test_a_table_without_pictures_is_refused(tmp_path: Path) -> None:
    add_rows(tmp_path / "table", ["gone"], outcome="failed")
    with pytest.raises(ConfigError, match=r"has no ok row at version 0; run `mdm refresh` first"):
        embed(EmbedConfig(table=str(tmp_path / "table")))
    with pytest.raises(ConfigError, match=r"has no embeddings by minilm; run `mdm embed --table"):
        EmbeddingStore.open(SampleTable.open(str(tmp_path / "table")), "minilm")
    with pytest.raises(ConfigError, match=r"is not a table"):
        embed(EmbedConfig(table=str(tmp_path / "nowhere")))


def test_slugs_are_folder_names_and_differ_where_names_do() -> None:
    names = ["minilm", "open_clip:ViT-B-32/laion2b", "open_clip:ViT-B-32-laion2b", "t5:google/flan-t5-xl", "t5:/a/b"]
    slugs = [encoder_slug(name) for name in names]
    assert slugs[0] == "minilm"
    assert len(set(slugs)) == len(names)
    assert all("/" not in slug and ":" not in slug and not slug.startswith(("_", ".")) for slug in slugs)
