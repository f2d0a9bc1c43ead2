"""S3 as this project uses it: how it is reached, how often a request is tried, and what is said where it can't be used.

Used by `pipelines.storage` alone. Credentials and addresses come from the environment.
"""

import functools
import os
from typing import Any

import fsspec
import pyarrow as pa

from mdm_core.errors import ConfigError

_REQUESTS_AT_ONCE = 32
_ANOTHER_REGION = "the bucket is in another region: set AWS_REGION"
_FIXES = {
    "SignatureDoesNotMatch": "the secret is not that of the key: correct AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "the key is not known there: correct AWS_ACCESS_KEY_ID",
    "ExpiredToken": "renew the credentials, AWS_SESSION_TOKEN too",
    "InvalidToken": "renew the credentials, AWS_SESSION_TOKEN too",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "NoSuchBucket": "make the bucket, or correct its name",
    "AuthorizationHeaderMalformed": _ANOTHER_REGION,
    "IllegalLocationConstraintException": _ANOTHER_REGION,
    "PermanentRedirect": _ANOTHER_REGION,
}


def endpoint() -> str:
    """Returns the address of the S3 server; empty for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def filesystem(**options: Any) -> Any:
    """Returns the fsspec filesystem of all buckets.

    Raises:
        ConfigError: The package for it is not installed.
    """
    # Arrow waits for S3 in threads of its own, eight if nothing is said; botocore has ten connections.
    pa.set_io_thread_count(max(pa.io_thread_count(), _REQUESTS_AT_ONCE))
    # botocore reads AWS_DEFAULT_REGION only, and deltalake AWS_REGION first.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return fsspec.filesystem(
            "s3",
            endpoint_url=endpoint() or None,
            client_kwargs={"region_name": region} if region else {},
            # Each request is tried so often by botocore, and the whole five times by s3fs, where it may pass.
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 4},
                "max_pool_connections": _REQUESTS_AT_ONCE,
            },
            # Others write there at the same time: what was listed before says nothing.
            use_listings_cache=False,
            **options,
        )
    except ImportError as error:
        raise ConfigError("s3:// needs s3fs, which is not installed; pip install 'mdm[s3]'") from error


def delta_options() -> dict[str, str]:
    """Returns what deltalake needs beyond the environment."""
    # A commit is a put that fails if the version is there: without it, two refreshes at once would lose one's work.
    options = {"aws_conditional_put": "etag"}
    if address := endpoint():
        options |= {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": str(address.startswith("http://")).lower()}
    return options


def abort_uploads(filesystem: Any, folder: str, *, before_s: float) -> int:
    """Aborts uploads in parts under a folder that began before a time and never ended; returns how many.

    Their parts take room that no listing shows.

    Args:
        filesystem: As `filesystem` returns it.
        folder: The bucket and the key of the folder.
        before_s: Seconds since 1970.
    """
    bucket, _, key = folder.partition("/")
    prefix = key.rstrip("/") + "/" if key else ""
    try:
        uploads = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
        left = [upload for upload in uploads if upload["Initiated"].timestamp() < before_s]
        for upload in left:
            filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    except (OSError, NotImplementedError):
        # A key that may write need not be allowed to list uploads, and not every server can.
        return 0
    return len(left)


@functools.cache
def check_bucket(bucket: str, address: str) -> None:
    """Asks once whether a bucket can be used, and says in one message why not.

    The errors of what comes later are not so plain, nor so quick: deltalake tries a dead address for three minutes.

    Args:
        bucket: Its name.
        address: That of the server, as `endpoint` returns it.

    Raises:
        ConfigError: It can't be used.
    """
    probe = filesystem(skip_instance_cache=True)
    # Only botocore's tries: a dead address is known as such in a few seconds.
    probe.retries = 1
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    where = f"s3://{bucket} at {address or 'AWS'}"
    try:
        probe.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ConfigError(
            f"{where} can't be used: there are no credentials in the environment; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except (BotoCoreError, ValueError) as error:
        # ValueError: the address is not one.
        raise ConfigError(
            f"{where} can't be reached: no S3 server answers ({error}); correct AWS_ENDPOINT_URL, or unset it for AWS"
        ) from error
    except OSError as error:
        answer = error.__cause__.response["Error"] if isinstance(error.__cause__, ClientError) else {}
        code = answer.get("Code", "")
        # A key that may not list may still be allowed to read or to write.
        if code != "AccessDenied":
            fix = _FIXES.get(code, "check the bucket's name, AWS_ENDPOINT_URL and the credentials")
            raise ConfigError(f"{where} can't be used: it answers {code or error}; {fix}") from error
