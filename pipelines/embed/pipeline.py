"""Embeds the captions of a table: a Ray Data job over those shards that have no embeddings yet."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdm_core.errors import ConfigError, MdmError, WorkError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable, Shard, row_group_sizes
from pipelines.embed import store
from pipelines.embed.config import EmbedConfig
from pipelines.embed.store import EncoderInfo
from pipelines.progress import Progress

if TYPE_CHECKING:
    from pipelines.text_encoder import TextEncoder

_MAX_BLOCKS = 1000


@dataclass(frozen=True)
class EmbedReport:
    """What an embedding run did."""

    encoder: str
    width: int
    max_tokens: int
    table_version: int
    shards: int
    rows: int
    embedded_shards: int
    embedded_rows: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON holds it."""
        return asdict(self)


def embed(config: EmbedConfig) -> EmbedReport:
    """Writes the embeddings that are missing beside the ok shards of a table.

    A file is there whole or not at all, so a run that was stopped is continued by the next. With nothing to do, Ray is
    not started.

    Raises:
        ConfigError: There is no such table or encoder, it has embeddings with another `max_tokens`, or the cluster is
            too small.
        WorkError: A file could not be written.
    """
    began_s = time.monotonic()
    table = SampleTable.open(config.table, None if config.version == "latest" else config.version)
    shards = table.shards("ok")
    if not shards:
        raise ConfigError(f"{table.uri} has no ok row at version {table.version}; run `mdm refresh` first")
    info = store.read_info(table.uri, config.encoder)
    if info is None:
        # Files without the word of what made them: nobody can tell whether they fit.
        storage.delete(store.embedding_folder(table.uri, config.encoder))
    else:
        store.check_max_tokens(table.uri, info, config.max_tokens)
    missing = store.missing_shards(table, config.encoder)
    if missing:
        _run(config, table, missing)
        info = store.read_info(table.uri, config.encoder)
    if info is None:
        raise WorkError(f"the embeddings of {table.uri} were deleted while they were made; run `mdm embed` again")
    return EmbedReport(
        encoder=info.encoder,
        width=info.width,
        max_tokens=info.max_tokens,
        table_version=table.version,
        shards=len(shards),
        rows=sum(shard.num_rows for shard in shards),
        embedded_shards=len(missing),
        embedded_rows=sum(shard.num_rows for shard in missing),
        seconds=round(time.monotonic() - began_s, 3),
    )


class EmbedShards:
    """An actor that holds the encoder and embeds one shard after another."""

    def __init__(self, config: EmbedConfig, table_uri: str, table_version: int) -> None:
        self._config = config
        self._table = SampleTable.open(table_uri, table_version)
        self._shards = {shard.path: shard for shard in self._table.shards("ok")}
        self._encoder: TextEncoder | None = None

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Embeds the shards with these paths, and returns how many rows they have, or what went wrong."""
        shards = [self._shards[str(path)] for path in batch["path"]]
        error = kind = ""
        try:
            for shard in shards:
                self._embed(shard)
        except MdmError as found:
            # Raised, it would reach the driver as text inside a log of Ray's, with its class lost.
            error, kind = str(found), "config" if isinstance(found, ConfigError) else "work"
        num_rows = sum(shard.num_rows for shard in shards)
        return {"num_rows": np.array([num_rows]), "error": np.array([error]), "error_kind": np.array([kind])}

    def _embed(self, shard: Shard) -> None:
        encoder = self._load()
        with self._table.open_shard(shard) as file:
            rows, row_groups = file.read(columns=["id", "caption"]), row_group_sizes(file)
        embeddings = encoder.encode(rows["caption"].to_pylist())
        info = EncoderInfo(encoder.name, encoder.width, encoder.max_tokens)
        data = store.encode_embeddings(rows["id"], embeddings, info, row_groups)
        storage.write_bytes_atomic(
            storage.join(store.embedding_folder(self._table.uri, encoder.name), shard.path), data
        )

    def _load(self) -> "TextEncoder":
        # Not when the actor is made: an error there reaches the user as a dead actor.
        if self._encoder is None:
            from pipelines.text_encoder import load_text_encoder

            device = "cuda" if self._config.gpus_per_worker else "cpu"
            encoder = load_text_encoder(self._config.encoder, max_tokens=self._config.max_tokens, device=device)
            store.write_info(self._table.uri, EncoderInfo(encoder.name, encoder.width, encoder.max_tokens))
            self._encoder = encoder
        return self._encoder


def _run(config: EmbedConfig, table: SampleTable, shards: tuple[Shard, ...]) -> None:
    import ray
    import ray.data

    from pipelines import cluster

    cluster.connect()
    num_workers = _num_workers(config.workers, config.gpus_per_worker, len(shards))
    cluster.connect(min_cpus=num_workers)
    captions = ray.data.from_items(
        [{"path": shard.path} for shard in shards], override_num_blocks=min(len(shards), _MAX_BLOCKS)
    )
    done = captions.map_batches(
        EmbedShards,
        fn_constructor_args=(config, table.uri, table.version),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=config.gpus_per_worker,
    )
    num_rows = sum(shard.num_rows for shard in shards)
    with Progress("embed", total=num_rows, unit="captions") as progress, cluster.data_context():
        for row in done.iter_rows():
            if row["error"]:
                raise (ConfigError if row["error_kind"] == "config" else WorkError)(row["error"])
            progress.advance(int(row["num_rows"]))


def _num_workers(workers: int | Literal["auto"], gpus_per_worker: int, num_shards: int) -> int:
    import ray

    if workers != "auto":
        return min(workers, num_shards)
    has = int(ray.cluster_resources().get("GPU" if gpus_per_worker else "CPU", 0))
    if gpus_per_worker and not has:
        raise ConfigError("gpus_per_worker=1, but the Ray cluster has no GPU; set it to 0 or join another cluster")
    return min(has, num_shards)
