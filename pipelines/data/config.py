"""The configuration of a refresh."""

import ipaddress
import re
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from pipelines.run_config import Config
from pipelines.tracking import TrackingConfig

Network: TypeAlias = Annotated[str, AfterValidator(lambda text: str(ipaddress.ip_network(text)))]
Column: TypeAlias = Annotated[int, Field(ge=0)] | str
Range: TypeAlias = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
LanguageCode: TypeAlias = Annotated[str, AfterValidator(lambda text: _language_code(text))]

_NO_LIMIT = 1_000_000
_PRESETS: dict[str, dict[str, object]] = {
    "cc12m": {
        "min_side_px": 401,
        "max_aspect": 2.5,
        "caption_words": (3, 256),
        "caption_chars": (0, _NO_LIMIT),
    },
    "datacomp_basic": {
        "min_side_px": 200,
        "max_aspect": 3.0,
        "caption_words": (3, _NO_LIMIT),
        "caption_chars": (6, _NO_LIMIT),
        "language": ("en",),
    },
}


def _language_code(text: str) -> str:
    # Whether it is known is asked of the detector, which takes a second to load.
    if not re.fullmatch("[a-z]{2,3}", text):
        raise ValueError(f"got {text!r}; wanted an ISO 639 code of two or three small letters, as en")
    return text


class ColumnsConfig(Config):
    """Where a list keeps what is read from it: the position of a column, from 0, or its name."""

    url: Column = 0
    """Column of the link: a position, or a name where the list has names."""
    caption: Column = 1
    """Column of the caption: a position, or a name where the list has names."""


class SourceConfig(Config):
    """The list of links."""

    uri: str = Field(min_length=1)
    """The list: a local path, s3://… or https://…, or several parts as in part-*.tsv.gz; .gz and .zst are unpacked."""
    format: Literal["tsv", "csv", "parquet", "jsonl", "img2dataset"] = "tsv"
    """How the list is written. In tsv quotes mean nothing: one line is one row. img2dataset is a folder that it made,
    whose pictures are taken as they are, without fetching."""
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

    engine: Literal["native", "img2dataset"] = "native"
    """What fetches and resizes: this project's code, or img2dataset's, for those who need its exact pixels."""
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
    format: Literal["jpeg", "webp", "png", "source"] = "jpeg"
    """How pictures are stored. png loses nothing, which matters at 64 px and below; source is the format that came,
    and the very bytes that came where nothing had to be changed."""
    quality: int = Field(default=95, ge=1, le=100)
    """Quality of jpeg and webp."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Largest picture decoded, or enlarged to, in pixels; its size is read from its header."""


class VideoConfig(Config):
    """What is stored of a video: one clip, whose frames are pictures as `image` says."""

    num_frames: int = Field(default=16, ge=1, le=1024)
    """Frames of a clip; a video too short for them is filtered."""
    fps: float = Field(default=8.0, gt=0, le=240)
    """Frames a second of the clip: those on the screen at these times, whatever the video's own rate."""
    scene_cuts: bool = True
    """Whether the clip is the first stretch between two cuts that has room for it, if there is one in the first four
    lengths of the clip; else it begins with the video."""


class FiltersConfig(Config):
    """What is not stored. Rows that are filtered keep their link and caption, not their picture."""

    preset: Literal["cc12m", "datacomp_basic"] | None = None
    """Published rules for the fields below that are not given: cc12m, the image and text filters of Conceptual 12M
    (arXiv 2102.08981, section 2: both sides over 400 pixels, aspect at most 2.5, 3 to 256 words; what looks at the
    words themselves is left out), or datacomp_basic, DataComp's basic filtering (arXiv 2304.14108, section 4: English,
    over 2 words and 5 characters, aspect at most 3, shorter side at least 200)."""
    min_side_px: int = Field(default=200, ge=0)
    """Shorter side wanted, in pixels, before resizing."""
    max_aspect: float = Field(default=3.0, ge=1)
    """Longer side over shorter side, at most."""
    caption_words: Range = (3, 256)
    """Words wanted in a caption, from and to. Words lie between spaces; in scripts without spaces, as Chinese,
    Japanese and Thai, every two characters count as one."""
    caption_chars: Range = (5, 2000)
    """Characters wanted in a caption, from and to."""
    language: Annotated[tuple[LanguageCode, ...], Field(min_length=1)] | None = None
    """Languages wanted in captions, by ISO 639 code, as in [en, de]; needs the extra mdm[scores]."""
    exact_duplicates: bool = True
    """Leave out pictures whose bytes equal those of an earlier one."""
    near_duplicates: Annotated[int, Field(ge=0, le=15)] | None = None
    """Leave out pictures whose perceptual hash differs from an earlier one's in at most so many of 64 bits."""
    exclude_hashes: str | None = None
    """A file of hashes, one a line, of pictures to keep out, as those of evaluation sets: SHA-256 of the bytes fetched
    (64 hexadecimal digits), or perceptual hashes (16)."""

    @model_validator(mode="after")
    def _fill_from_preset(self) -> Self:
        """The preset's rules become given values, so that the resolved configuration shows them and keeps them."""
        if self.preset is not None:
            rules = {name: rule for name, rule in _PRESETS[self.preset].items() if name not in self.model_fields_set}
            self.__dict__.update(rules)
            self.model_fields_set.update(rules)
        return self

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for field, (low, high) in (("caption_words", self.caption_words), ("caption_chars", self.caption_chars)):
            if low > high:
                raise ValueError(f"{field}=[{low}, {high}] lets nothing through; wanted [smaller, larger]")
        return self


class ClipConfig(Config):
    """A CLIP model of open_clip."""

    model: str = Field(default="ViT-B-32", min_length=1)
    """Name of an architecture that open_clip knows, or hf-hub:NAME or local-dir:FOLDER, which bring their weights."""
    pretrained: str | None = None
    """Weights: a name that open_clip knows for the model, or the path of a file."""
    device: str = "auto"
    """Where it runs: cpu, cuda, or auto, which is cuda where there is one."""
    batch: int = Field(default=64, ge=1)
    """Pictures scored at once."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        brings_weights = self.model.startswith(("hf-hub:", "local-dir:"))
        if self.pretrained is None and not brings_weights:
            raise ValueError(
                f"pretrained is missing, and scores of {self.model} with random weights mean nothing; "
                "name its weights, as in pretrained: laion2b_s34b_b79k, or a file"
            )
        if self.pretrained is not None and brings_weights:
            raise ValueError(f"{self.model} brings its own weights; leave out pretrained={self.pretrained}")
        return self


class ScoreConfig(Config):
    """Columns of numbers by which training may select rows; nothing is left out here. Rows of the list that are in the
    table already, and lack one, get it without a fetch.
    """

    clip: ClipConfig | None = None
    """Model of `clip_similarity` and of the zero-shot scores."""
    nsfw: bool = False
    """Whether `score_nsfw`, a probability, is stored; needs the extra mdm[scores]."""
    zero_shot: dict[str, tuple[str, str]] = Field(default_factory=dict)
    """Column `score_NAME` for each name: the probability of the first text against the second."""

    @model_validator(mode="after")
    def _check_zero_shot(self) -> Self:
        for name, texts in self.zero_shot.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"zero_shot: {name!r} can't be a part of a column's name; use small letters, digits and _"
                )
            if name == "nsfw" and self.nsfw:
                raise ValueError("zero_shot: nsfw would be the column score_nsfw, which nsfw: true makes; rename it")
            if texts[0] == texts[1] or not all(text.strip() for text in texts):
                raise ValueError(f"zero_shot.{name}={list(texts)} compares nothing; give two texts that differ")
        if self.zero_shot and self.clip is None:
            raise ValueError(
                "zero_shot needs a model; set score.clip, as in clip: {model: ViT-B-32, pretrained: laion2b_s34b_b79k}"
            )
        return self


class RunConfig(Config):
    """How the work is cut up and repeated."""

    shard_rows: int = Field(default=1000, ge=1, le=100_000)
    """Links a shard: one unit of work, and at most so many rows a file."""
    commit_every_s: float = Field(default=60.0, ge=0)
    """Seconds between commits: what a crash can cost, beside the slowest chunk of `shard_rows` links, as chunks are
    committed in their order."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that fetch and decode; auto: one a CPU of the cluster."""
    retry_failed: Literal["due", "none", "all"] = "due"
    """Failures to try again: due, those that may pass, after a wait that grows; all, every one."""
    limit: int | None = Field(default=None, ge=0)
    """Read only so many rows of the list."""
    prune: bool = False
    """Whether links of this source that are no longer in the list are taken out of the table."""


class RefreshConfig(Config):
    """Bring a table of pictures up to date with a list of links."""

    source: SourceConfig
    table: TableConfig
    fetch: FetchConfig = FetchConfig()
    image: ImageConfig = ImageConfig()
    video: VideoConfig | None = None
    """Take the links for videos, and store a clip of each."""
    filters: FiltersConfig = FiltersConfig()
    score: ScoreConfig = ScoreConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig | None = TrackingConfig()
    """Where refreshes are told of; null for nowhere."""

    @model_validator(mode="after")
    def _check_video(self) -> Self:
        if self.video is not None and self.image.format == "source":
            raise ValueError("image.format=source keeps what came, and frames of a video never came alone; take jpeg")
        if self.video is not None and (self.source.format == "img2dataset" or self.fetch.engine == "img2dataset"):
            raise ValueError("img2dataset has pictures only; leave video out, or take the native engine and a list")
        return self

    @model_validator(mode="after")
    def _check_prune(self) -> Self:
        if self.run.prune and self.run.limit is not None:
            raise ValueError(
                f"run.limit={self.run.limit} reads a part of the list, and run.prune would remove the rest; "
                "leave one of them out"
            )
        return self


class ForgetConfig(Config):
    """Take links out of a table for good."""

    table: str = Field(min_length=1)
    """The sample table: a local folder or s3://…."""
    urls: str = Field(min_length=1)
    """A file of links, one a line, exactly as they stood in the list."""
