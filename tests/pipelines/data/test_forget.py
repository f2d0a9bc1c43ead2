from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.forget import main
from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.config import ForgetConfig
from pipelines.data.filters import CaptionFilter
from pipelines.data.forget import forget
from pipelines.data.refresh import refresh
from pipelines.data.table import keys
from pipelines.data.table.commit import commit
from pipelines.data.table.rewrite import prune, recaption
from pipelines.data.table.sample_table import SampleTable
from tests.pipelines.data.picture_server import PictureServer
from tests.pipelines.data.test_commit import ONCE, ledger, links, write
from tests.pipelines.data.test_refresh import configure, counts, line, rows
from tests.pipelines.file_server import FileServer


def urls_file(tmp_path: Path, *urls: str) -> str:
    path = tmp_path / "takedown.txt"
    path.write_text("\n".join(urls) + "\n")
    return str(path)


def on_disk(table: Path, column: str) -> list[object]:
    """Returns a column of every Parquet file there is, whatever the log says of it."""
    return [value for file in table.rglob("*.parquet") for value in pq.read_table(file)[column].to_pylist()]


@pytest.mark.usefixtures("ray_cluster")
def test_forgotten_link_is_gone_with_its_bytes_and_never_asked_for_again(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(10))
    lines = [line(url) for url in urls]
    config = configure(tmp_path, lines[:9], run={"shard_rows": 4})
    refresh(config)
    # An older version holds the picture in a file of its own.
    lines[3] = line(urls[3], "another caption than before")
    refresh(configure(tmp_path, lines[:9], run={"shard_rows": 4}))
    picture = next(row["image"] for row in rows(config, "ok") if row["url"] == urls[3])
    assert sum(image == picture for image in on_disk(tmp_path / "table", "image")) == 2

    report = forget(ForgetConfig(table=config.table.uri, urls=urls_file(tmp_path, urls[3], urls[9])))
    assert (report.links, report.rows_removed, report.already_forgotten) == (2, 1, 0)
    assert report.files_deleted == 2
    assert report.table_version == SampleTable.open(config.table.uri).version
    for name, value in (("image", picture), ("url", urls[3]), ("url", urls[9])):
        assert value not in on_disk(tmp_path / "table", name)
    assert [row["url"] for row in rows(config, "ok")] == [url for url in urls[:9] if url != urls[3]]
    tombs = rows(config, "filtered")
    assert {row["id"] for row in tombs} == {keys.link_key(urls[3]), keys.link_key(urls[9])}
    assert {(row["url"], row["caption"], row["reason"], row["image"]) for row in tombs} == {("", "", "forgotten", None)}

    server.forget()
    again = refresh(configure(tmp_path, lines, run={"retry_failed": "all"}))
    assert counts(again) == {
        "links": 10, "ok": 0, "filtered": 0, "failed": 0, "duplicate": 0, "malformed": 0, "unchanged": 10,
    }  # fmt: skip
    assert not server.hits
    twice = forget(ForgetConfig(table=config.table.uri, urls=urls_file(tmp_path, urls[3])))
    assert (twice.rows_removed, twice.already_forgotten, twice.files_deleted) == (0, 1, 0)


def test_refresh_that_is_at_work_does_not_bring_the_link_back(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a"])], ONCE)
    running = ledger(uri)
    written = [write(uri, 1, ["http://h/b", "http://h/c"])]
    forget(ForgetConfig(table=uri, urls=urls_file(tmp_path, "http://h/b")))
    tally = commit(running, written, ONCE)
    assert dict(tally.outcomes) == {"unchanged": 1, "ok": 1}
    assert links(uri, "ok") == ["http://h/a", "http://h/c"]
    assert "http://h/b" not in on_disk(tmp_path / "table", "url")


def test_link_with_a_space_is_forgotten_as_it_stood_in_the_list(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a b.jpg", "http://h/a", "http://h/c\td"])], ONCE)
    urls = urls_file(tmp_path, "http://h/a b.jpg", "http://h/c\td")
    assert forget(ForgetConfig(table=uri, urls=urls)).rows_removed == 2
    assert links(uri, "ok") == ["http://h/a"]
    assert forget(ForgetConfig(table=uri, urls=urls)).already_forgotten == 2
    # What the table does not know may be a line of a list.
    with pytest.raises(ConfigError, match="line 1 is 'h/b'; line 2 is 'http://h/a b'; wanted"):
        forget(ForgetConfig(table=uri, urls=urls_file(tmp_path, "h/b", "http://h/a b", "http://h/a")))
    assert links(uri, "ok") == ["http://h/a"]


def test_pruning_keeps_what_stands_for_a_forgotten_link(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a", "http://h/b"])], ONCE)
    forget(ForgetConfig(table=uri, urls=urls_file(tmp_path, "http://h/a")))
    # A list at https://host/ has no file name, so its source may be called nothing, as that of such a row.
    for source in ("", "test"):
        prune(ledger(uri), source, keys.from_bytes(keys.link_key("http://h/c")), {})
    found = keys.from_bytes(keys.link_key("http://h/a") + keys.link_key("http://h/b"))
    assert ledger(uri).look_up(found)[0].tolist() == [True, False]


def test_older_file_that_cannot_be_read_keeps_no_other_from_being_deleted(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    names = ["http://h/a", "http://h/b", "http://h/c"]
    commit(ledger(uri), [write(uri, at, [name, f"{name}/other"]) for at, name in enumerate(names)], ONCE)
    first = sorted((tmp_path / "table").rglob("*.parquet"))
    for name in names:
        recaption(ledger(uri), {keys.link_key(name): "another caption of it"}, CaptionFilter(ONCE), {})
    # Of three older files the one in the middle is damaged.
    first[1].write_bytes(b"")
    with pytest.raises(WorkError, match=f"{first[1].name} can't be read"):
        forget(ForgetConfig(table=uri, urls=urls_file(tmp_path, *names)))
    first[1].unlink()
    assert not set(names) & set(on_disk(tmp_path / "table", "url"))


def test_forgetting_that_was_killed_is_made_up_for_with_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a"])], ONCE)
    path = SampleTable.open(uri).shards()[0].path
    copy = tmp_path / "table" / "_embeddings" / "minilm" / path
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"numbers")
    delete = storage.delete
    config = ForgetConfig(table=uri, urls=urls_file(tmp_path, "http://h/a"))

    def delete_and_die(uri: str) -> None:
        delete(uri)
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "delete", delete_and_die)
    with pytest.raises(KeyboardInterrupt):
        forget(config)
    monkeypatch.setattr(storage, "delete", delete)
    forget(config)
    assert not copy.exists()
    assert "http://h/a" not in on_disk(tmp_path / "table", "url")


def test_failed_link_is_forgotten_and_not_tried_again(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a", "http://h/b"], "failed")], ONCE)
    forget(ForgetConfig(table=uri, urls=urls_file(tmp_path, "http://h/a")))
    later = ledger(uri, timedelta(days=9), retry_failed="all")
    assert later.to_retry()[0].tobytes() == keys.link_key("http://h/b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"http://h/a\nh/b\n", r"line 2 is 'h/b'; wanted one http\(s\) link a line; nothing was forgotten"),
        (b"http://h/a caption\n", "line 1 is 'http://h/a caption'"),
        (b"\n\n", "it is empty"),
        (b"http://h/\xff\n", "line 1 is not UTF-8"),
    ],
)
def test_file_of_something_else_changes_nothing(tmp_path: Path, text: bytes, message: str) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a"])], ONCE)
    (tmp_path / "urls").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        forget(ForgetConfig(table=uri, urls=str(tmp_path / "urls")))
    assert links(uri) == ["http://h/a"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a"])], ONCE)
    assert main(["--table", uri, "--urls", str(tmp_path / "none")]) == 2
    assert "none cannot be read: No such file" in capsys.readouterr().err
    with FileServer() as server:
        server.files["/forbidden"] = b"http://h/a"
        assert main(["--table", uri, "--urls", server.url("/forbidden")]) == 2
    assert "/forbidden cannot be read: HTTP 403 Forbidden; give a file of links" in capsys.readouterr().err
    assert main(["--table", str(tmp_path), "--urls", urls_file(tmp_path, "http://h/a")]) == 2
    assert main(["--table", uri, "--urls", urls_file(tmp_path, "http://h/a"), "--json"]) == 0
    assert '"rows_removed": 1' in capsys.readouterr().out
