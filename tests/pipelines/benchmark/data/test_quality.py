"""PSNR of pairs whose closed form is known, and pictures taken from what both contenders leave behind."""

import io
import json
import math
import tarfile
from datetime import UTC, datetime

import numpy as np
import pytest
from deltalake import DeltaTable
from PIL import Image

from pipelines.benchmark.data.noop import make_table
from pipelines.benchmark.data.photos import photo, tiny
from pipelines.benchmark.data.quality import mean_psnr_db, psnr_db, stored_in_table, stored_in_tars


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_psnr_of_known_pairs():
    flat = np.full((10, 20, 3), 100, np.uint8)
    # A step of 5 everywhere: 20 log10(255 / 5). A step of 255 in one value of 600: 10 log10(600).
    assert psnr_db(flat + np.uint8(5), flat) == pytest.approx(20 * math.log10(51))
    one = np.zeros((10, 20, 3), np.uint8)
    one[3, 4, 1] = 255
    assert psnr_db(one, np.zeros_like(one)) == pytest.approx(10 * math.log10(600))
    assert psnr_db(flat, flat) == math.inf


def test_the_mean_is_taken_against_lanczos_of_the_whole_original():
    original = photo(0)
    with Image.open(io.BytesIO(original)) as picture:
        exact = np.asarray(picture.convert("RGB").resize((96, 72), Image.Resampling.LANCZOS)).astype(int)
    off_by = {0: 3, 1: 6}
    stored = [
        (n, png(np.where(exact >= step, exact - step, exact + step).astype(np.uint8))) for n, step in off_by.items()
    ]
    wanted = [20 * math.log10(255 / step) for step in off_by.values()]
    found = mean_psnr_db(iter(stored), lambda number: original)
    assert found == {"psnr_db": pytest.approx(sum(wanted) / 2), "pictures": 2}
    assert mean_psnr_db(iter(stored), lambda number: original, every=2) == {
        "psnr_db": pytest.approx(wanted[0]),
        "pictures": 1,
    }


def test_pictures_come_back_from_a_table_and_from_shards(tmp_path):
    _, table = make_table(tmp_path / "noop", 5)
    assert dict(stored_in_table(str(table))) == {number: tiny(number) for number in range(5)}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in (3, 9):
            meta = json.dumps({"url": f"http://127.0.1.1:80/photo/{number}"}).encode()
            for suffix, content in (("jpg", tiny(number)), ("json", meta)):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert dict(stored_in_tars(tmp_path)) == {3: tiny(3), 9: tiny(9)}


def test_the_table_of_the_no_op_refresh_has_its_rows(tmp_path):
    began = datetime.now(UTC)
    links, table = make_table(tmp_path / "noop", 2500)
    rows = DeltaTable(str(table)).to_pyarrow_table()
    assert rows.num_rows == 2500
    assert len(set(rows["id"].to_pylist())) == len(set(rows["sha256"].to_pylist())) == 2500
    assert set(rows["outcome"].to_pylist()) == {"ok"}
    assert min(rows["fetched_at"].to_pylist()) >= began
    assert len(DeltaTable(str(table)).file_uris()) == 3
    listed = dict(line.split("\t") for line in links.read_text().splitlines())
    assert listed == dict(zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True))
    before = links.stat().st_mtime_ns
    make_table(tmp_path / "noop", 2500)
    assert links.stat().st_mtime_ns == before
