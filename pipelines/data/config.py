"""The configuration of a refresh."""

import ipaddress
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from pipelines.run_config import Config

Network: TypeAlias = Annotated[str, AfterValidator(lambda text: str(ipaddress.ip_network(text)))]
Range: TypeAlias = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class ColumnsConfig(Config):
    """Where a list keeps what is read from it: the position of a column, from 0, or its name."""

    url: int | str = 0
    """Column of the link: a position, or a name where the list has names."""
    caption: int | str = 1
    """Column of the caption: a position, or a name where the list has names."""


class SourceConfig(Config):
    """The list of links."""

    uri: str = Field(min_length=1)
    """The list: a local path or s3://…; .gz and .zst are unpacked as it is read."""
    format: Literal["tsv", "csv", "parquet", "jsonl"] = "tsv"
    """How the list is written. In tsv quotes mean nothing: one line is one row."""
    header: bool = False
    """Whether the first line of a tsv or csv list names the columns."""
    columns: ColumnsConfig = ColumnsConfig()
    name: str = ""
    """Stored with every row as its source; the list's file name if empty."""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        for field, column in (("url", self.columns.url), ("caption", self.columns.caption)):
            if self.format == "jsonl" and isinstance(column, int):
                raise ValueError(f"columns.{field}={column} is a position, and jsonl has only names; try {field!r}")
            if self.format in ("tsv", "csv") and isinstance(column, str) and not self.header:
                raise ValueError(f"columns.{field}={column!r} is a name, and the list has none; set header: true")
        return self


class TableConfig(Config):
    """The sample table."""

    uri: str = Field(min_length=1)
    """The table: a local folder or s3://…; made if it is not there."""


class FetchConfig(Config):
    """How links are fetched, and what is never fetched."""

    concurrency: int = Field(default=256, ge=1, le=10_000)
    """Links that each worker fetches at once."""
    per_host: int = Field(default=8, ge=1)
    """Links that each worker fetches at once from one host."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Seconds to wait for a connection."""
    deadline_s: float = Field(default=20.0, gt=0)
    """Seconds for one link in all: connections, redirects, retries and the body, whatever the server does."""
    max_bytes: int = Field(default=50_000_000, ge=1)
    """Largest body accepted, in bytes, sent and unpacked."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects followed; each is checked like a first request."""
    retries: int = Field(default=2, ge=0)
    """Further tries, inside the deadline, of what may pass: 429, 5xx, a lost connection."""
    user_agent: str = Field(default="mdm/0.1 (dataset refresh)", min_length=1)
    """Sent with every request; name a contact in it when fetching at scale."""
    allow_networks: tuple[Network, ...] = ()
    """Private networks that may be fetched from, as in 127.0.0.0/8; public addresses always may."""
    honour_opt_out: bool = True
    """Leave out what is served with X-Robots-Tag: noai, noimageai, noindex or noimageindex."""
    verify_tls: bool = True
    """Whether certificates must be valid."""


class ImageConfig(Config):
    """What is stored of a picture."""

    size_px: int = Field(default=256, ge=1, le=16_384)
    """Side to resize to, in pixels."""
    resize: Literal["shorter_side", "center_crop", "longer_side", "none"] = "shorter_side"
    """Which side becomes size_px; center_crop resizes the shorter one and cuts the middle square out."""
    upscale: bool = False
    """Whether smaller pictures are enlarged; else they are stored as they are."""
    format: Literal["jpeg", "webp", "png"] = "jpeg"
    """How pictures are stored; png loses nothing, which matters at 64 px and below."""
    quality: int = Field(default=95, ge=1, le=100)
    """Quality of jpeg and webp."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Largest picture decoded, in pixels, read from its header."""


class FiltersConfig(Config):
    """What is not stored. Rows that are filtered keep their link and caption, not their picture."""

    min_side_px: int = Field(default=200, ge=0)
    """Shorter side wanted, in pixels, before resizing."""
    max_aspect: float = Field(default=3.0, ge=1)
    """Longer side over shorter side, at most."""
    caption_words: Range = (3, 256)
    """Words wanted in a caption, from and to."""
    caption_chars: Range = (5, 2000)
    """Characters wanted in a caption, from and to."""
    exact_duplicates: bool = True
    """Leave out pictures whose bytes equal those of an earlier one."""

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for field, (low, high) in (("caption_words", self.caption_words), ("caption_chars", self.caption_chars)):
            if low > high:
                raise ValueError(f"{field}=[{low}, {high}] lets nothing through; wanted [smaller, larger]")
        return self


class RunConfig(Config):
    """How the work is cut up and repeated."""

    shard_rows: int = Field(default=1000, ge=1, le=100_000)
    """Links a shard: one unit of work, and at most so many rows a file."""
    commit_every_s: float = Field(default=60.0, ge=0)
    """Seconds between commits: what a crash can cost."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that fetch and decode; auto: one a CPU of the cluster."""
    retry_failed: Literal["due", "none", "all"] = "due"
    """Failures to try again: due, those that may pass, after a wait that grows; all, every one."""
    limit: int | None = Field(default=None, ge=0)
    """Read only so many rows of the list."""


class RefreshConfig(Config):
    """Bring a table of pictures up to date with a list of links."""

    source: SourceConfig
    table: TableConfig
    fetch: FetchConfig = FetchConfig()
    image: ImageConfig = ImageConfig()
    filters: FiltersConfig = FiltersConfig()
    run: RunConfig = RunConfig()
