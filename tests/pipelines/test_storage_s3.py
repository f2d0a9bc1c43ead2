import time

import pytest

from mdm_core.errors import ConfigError, WorkError
from pipelines import file_patterns, s3, storage
from tests.pipelines.failing_proxy import FAILURES, FailingProxy
from tests.pipelines.s3_server import OWNER, READER, S3Server

SECRET = OWNER[1]


def forget() -> None:
    """Lets the next request be the first of this process."""
    import s3fs

    s3.check_bucket.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def test_bytes_come_back_as_they_were_written(bucket: str, s3_server: S3Server) -> None:
    uri = storage.join(bucket, "a", "b", "file.bin")
    assert not storage.exists(uri)
    storage.write_bytes_atomic(uri, b"one")
    first = file_patterns.fingerprint(uri)
    assert file_patterns.fingerprint(uri) == first
    storage.write_bytes_atomic(uri, b"two!")
    assert file_patterns.fingerprint(uri) != first
    assert storage.read_bytes(uri) == b"two!"
    assert abs(storage.modified_s(uri) - time.time()) < 60
    with storage.open_input(uri) as file:
        file.seek(1)
        assert file.read() == b"wo!"
    # As another client sees it.
    assert s3_server.filesystem().cat_file(uri) == b"two!"
    assert storage.list_files(storage.join(bucket, "a")) == [uri]
    storage.delete(storage.join(bucket, "a"))
    storage.delete(uri)
    assert storage.list_files(storage.join(bucket, "a")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    with pytest.raises(FileNotFoundError):
        storage.open_input(uri)


def test_what_another_client_does_is_seen_at_once(bucket: str, s3_server: S3Server) -> None:
    other = s3_server.filesystem()
    assert storage.list_files(bucket) == []
    other.pipe_file(f"{bucket}/x", b"1")
    assert storage.list_files(bucket) == [f"{bucket}/x"]
    other.pipe_file(f"{bucket}/y", b"1")
    assert storage.list_files(bucket) == [f"{bucket}/x", f"{bucket}/y"]
    # What one process has listed, with the same client.
    assert s3.filesystem().ls(bucket, detail=False) == [f"{bucket}/{name}".removeprefix("s3://") for name in "xy"]
    other.rm_file(f"{bucket}/y")
    assert not storage.exists(f"{bucket}/y")
    assert storage.list_files(bucket) == [f"{bucket}/x"]
    before = file_patterns.fingerprint(f"{bucket}/x")
    other.pipe_file(f"{bucket}/x", b"2")
    assert file_patterns.fingerprint(f"{bucket}/x") != before
    other.rm_file(f"{bucket}/x")
    assert not storage.exists(f"{bucket}/x")


def test_failing_requests_never_show(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {f"{bucket}/{number}": bytes([number]) * 50_000 for number in range(10)}
    with FailingProxy(s3_server.address, percent=25, seed=8) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forget()
        for uri, data in contents.items():
            storage.write_bytes_atomic(uri, data)
            assert storage.read_bytes(uri) == data
            with storage.open_input(uri) as file:
                file.seek(40_000)
                assert file.read(5_000) == data[:5_000]
        assert storage.list_files(bucket) == sorted(contents)
        storage.delete(bucket + "/0")
        assert not storage.exists(bucket + "/0")
    assert all(proxy.counts[kind] for kind in FAILURES)
    other = s3_server.filesystem()
    assert {f"s3://{path}": other.cat_file(path) for path in other.find(bucket)} == dict(list(contents.items())[1:])


def test_requests_that_fail_for_ever_are_one_message(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes_atomic(f"{bucket}/x", b"1")
    import s3fs

    # The server's end comes while there is work, after it was found well.
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with FailingProxy(s3_server.address, percent=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert storage.read_bytes(f"{bucket}/x") == b"1"
    with pytest.raises(WorkError, match=rf"could not write 1 bytes to {bucket}/x: .*{proxy.endpoint}"):
        storage.write_bytes_atomic(f"{bucket}/x", b"2")
    with pytest.raises(OSError, match=proxy.endpoint):
        storage.open_input(f"{bucket}/x")
    with pytest.raises(OSError, match=proxy.endpoint):
        file_patterns.fingerprint(f"{bucket}/x")
    for work, what in (
        (storage.exists, "look at"),
        (storage.modified_s, "look at"),
        (storage.list_files, "list the files of"),
        (storage.delete, "delete"),
        (lambda uri: storage.delete_unfinished(uri, older_than_s=0, now_s=0), "look for unfinished files in"),
    ):
        with pytest.raises(
            WorkError, match=rf"could not {what} {bucket}/x: .*{proxy.endpoint}.*; mend it and run again"
        ):
            work(f"{bucket}/x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-one"}, "answers SignatureDoesNotMatch; .*correct AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "stranger"}, "answers InvalidAccessKeyId; .*correct AWS_ACCESS_KEY_ID"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "at http://127.0.0.1:9 can't be reached: .*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, "can't be reached: .*Invalid endpoint: 127.0.0.1:9"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "no credentials in the environment; set AWS_ACCESS_KEY_ID and AWS_SEC"),
        ({"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None}, "no credentials in the environment"),
    ],
)
def test_what_cannot_be_reached_is_said_in_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    uses = (storage.read_bytes, storage.open_input, storage.exists, storage.list_files, storage.delta_options)
    for use in uses:
        forget()
        with pytest.raises(ConfigError, match=message) as caught:
            use(f"{bucket}/x")
        assert str(caught.value).startswith(bucket)
        assert "\n" not in str(caught.value)
        assert not any(word in str(caught.value) for word in (SECRET, "wrong-one"))
        if "reached" in message:
            # Trying takes its time, and all of them ask the same way.
            break
    forget()
    with pytest.raises(ConfigError, match=message):
        storage.write_bytes_atomic(f"{bucket}/x", b"1")


def test_bucket_that_is_not_there(bucket: str) -> None:
    for use in (storage.read_bytes, storage.exists, storage.delta_options):
        with pytest.raises(ConfigError, match=r"^s3://no-such-bucket at .* it answers NoSuchBucket; make the bucket"):
            use("s3://no-such-bucket/x")
    assert not storage.exists(f"{bucket}/x")


def test_bucket_that_is_only_to_be_read(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes_atomic(f"{bucket}/x", b"1")
    for name, value in s3_server.environment(READER).items():
        monkeypatch.setenv(name, value)
    forget()
    assert storage.read_bytes(f"{bucket}/x") == b"1"
    with pytest.raises(WorkError, match=rf"could not write 1 bytes to {bucket}/x: Access Denied"):
        storage.write_bytes_atomic(f"{bucket}/x", b"2")


def test_a_bucket_is_asked_about_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes_atomic(f"{bucket}/x", b"1")
    assert s3.check_bucket.cache_info().currsize > 0
    monkeypatch.setattr(s3, "filesystem", lambda **options: pytest.fail("asked again") if options else None)
    storage.delta_options(f"{bucket}/y")


def test_options_of_deltalake(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = storage.delta_options(bucket)["AWS_ENDPOINT_URL"]
    assert storage.delta_options(bucket) == {
        "aws_conditional_put": "etag",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    # The address for S3 alone comes first, to botocore as well.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget()
    assert storage.delta_options(bucket)["AWS_ENDPOINT_URL"] == endpoint
    assert storage.delta_options("/a/folder") == {}


def test_errors_of_deltalake_become_one_line(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltalake import DeltaTable

    options = storage.delta_options(bucket)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-one")
    with pytest.raises(OSError, match="SignatureDoesNotMatch") as caught:
        DeltaTable.is_deltatable(f"{bucket}/table", options)
    told = storage.one_line(caught.value)
    assert told.startswith("Generic S3 error : Error performing list request : Error performing GET http://127.0.0.1")
    assert "<Code>SignatureDoesNotMatch</Code>" in told
    assert not set(told) & {"\n", "\x1b"}
    assert storage.one_line(ValueError()) == "ValueError"


def test_region_is_what_either_variable_says(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "eu-west-3")
            forget()
            storage.write_bytes_atomic(f"{bucket}/x", b"1")
            assert s3.filesystem().call_s3("head_bucket", Bucket=bucket.removeprefix("s3://"))
            assert s3.filesystem()._s3.meta.region_name == "eu-west-3"
    # And without any, a server that has no regions is used all the same.
    forget()
    assert storage.read_bytes(f"{bucket}/x") == b"1"
