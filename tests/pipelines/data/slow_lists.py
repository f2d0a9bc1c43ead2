"""A second reader of lists, slow and plain, to compare with: the whole file in memory, one line after the other."""

import csv
import json
import re
from collections import Counter
from typing import Any

Found = tuple[str, str, str]  # fault, link, caption


def read_slowly(content: bytes, kind: str, url: Any, caption: Any, names: list[str] | None = None) -> list[Found]:
    """Returns what each line of a list without a header is; columns by position, or by key for jsonl."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    lines = [line.removesuffix(b"\r") for line in lines]
    if kind == "jsonl":
        return [judge_json(line, url, caption) for line in lines]
    counts = Counter(
        len(cells)
        for line in lines[:1000]
        if (cells := split(line.decode("utf-8", "replace"), kind)) is not None and len(cells) > max(url, caption)
    )
    num_columns = counts.most_common(1)[0][0] if counts else max(url, caption) + 1
    return [judge_cells(line, kind, url, caption, num_columns) for line in lines]


def split(line: str, kind: str) -> list[str] | None:
    if kind == "tsv":
        return line.split("\t")
    try:
        rows = list(csv.reader([line], strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def judge_cells(line: bytes, kind: str, url: int, caption: int, num_columns: int) -> Found:
    try:
        cells = split(line.decode("utf-8"), kind)
    except UnicodeDecodeError:
        return "not_utf8", "", ""
    if cells is None:
        return "bad_csv", "", ""
    if kind == "tsv" and caption == num_columns - 1 and len(cells) > num_columns:
        cells = [*cells[:caption], "\t".join(cells[caption:])]
    return judge(cells[url], cells[caption]) if len(cells) == num_columns else ("wrong_columns", "", "")


def judge_json(line: bytes, url: str, caption: str) -> Found:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not_utf8", "", ""
    except (ValueError, RecursionError):
        return "not_json", "", ""
    if not isinstance(record, dict):
        return "not_json", "", ""
    texts = record.get(url), record.get(caption)
    if not isinstance(texts[0], str) or not isinstance(texts[1], str):
        return "not_text", "", ""
    if any("\ud800" <= char <= "\udfff" for char in texts[0] + texts[1]):
        return "not_utf8", "", ""
    return judge(texts[0], texts[1])


def judge(url: str, caption: str) -> Found:
    url, caption = url.strip(), caption.strip()
    if re.match(r"https?://[^\s/?#]", url, re.IGNORECASE) is None:
        return "not_a_link", "", ""
    return ("", url, caption) if caption else ("no_caption", "", "")
