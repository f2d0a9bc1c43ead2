"""The accounting proof: a refresh of a list with every kind of trouble, against what the server knows it served.

    python -m tests.pipelines.data.accounting --links 20000
    python -m tests.pipelines.data.accounting --links 20000 --kills 5
    python -m tests.pipelines.data.accounting --links 20000 --kills 5 --s3 --fail_percent 5

Prints one line for each check and a total, and exits with 1 if any fails. With `--kills` the list is refreshed into a
second table while its driver or a worker is killed at random moments; both tables must be equal in the end. With `--s3`
the list and the tables are on a real S3 server behind a proxy that fails some of the requests.
"""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.pipelines.data.accounting_proof import Proof
from tests.pipelines.data.trouble_server import TroubleServer
from tests.pipelines.failing_proxy import FailingProxy
from tests.pipelines.s3_server import S3Server, without_aws

_BOMB_BYTES = 900_000_000
"""What Pillow would need for the pixels of one bomb."""


@contextlib.contextmanager
def s3_base(folder: Path, percent: float, seed: int) -> Iterator[tuple[str, FailingProxy]]:
    """Gives the URI of a bucket on a server behind a failing proxy, which the environment leads to."""
    with S3Server(folder / "s3") as server, FailingProxy(server.address, percent=percent, seed=seed) as proxy:
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(without_aws(before) | server.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint})
        try:
            yield server.make_bucket("accounting"), proxy
        finally:
            os.environ.clear()
            os.environ.update(before)


def main() -> int:
    """Runs the proof and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=int, default=20_000)
    parser.add_argument("--table", help="folder for the list and the tables; a temporary one by default")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="on an S3 server that is started for it")
    parser.add_argument("--fail_percent", type=float, default=5.0, help="requests to that server that fail")
    parser.add_argument("--deadline_s", type=float, default=10.0, help="for one link; some take all of it")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mdm-"))
    print(f"      {words}", flush=True)
    try:
        with contextlib.ExitStack() as stack:
            base, proxy = words.table or str(folder / "data"), None
            if words.s3:
                base, proxy = stack.enter_context(s3_base(folder, words.fail_percent, words.seed))
            server = stack.enter_context(TroubleServer(words.links, seed=words.seed))
            proof = Proof(
                server, folder, base, shard_rows=max(20, min(500, words.links // 20)), deadline_s=words.deadline_s
            )
            run(proof, words.kills, words.seed)
        if proxy is not None:
            proof.checks.equal("the proxy failed requests", proxy.num_failed > 0, words.fail_percent > 0)
            print(f"      requests to S3: {dict(proxy.counts)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = proof.checks.failed
    print(f"{proof.checks.num_passed} checks passed, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


def run(proof: Proof, num_kills: int, seed: int) -> None:
    """Makes all checks."""
    began_s = time.monotonic()
    result = proof.check_first("undisturbed")
    print(
        f"      {proof.links.num_links:,} links in {time.monotonic() - began_s:.1f} s with the checks, "
        f"the refresh {result.get('seconds')} s of them"
    )
    proof.check_nothing_new("undisturbed")
    if num_kills:
        draw = random.Random(seed)
        # At least one of each where there are two.
        victims = ["driver", "worker"][:num_kills] + draw.choices(["driver", "worker"], k=max(0, num_kills - 2))
        draw.shuffle(victims)
        began_s = time.monotonic()
        tables = proof.check_kills(victims, seed=seed, undisturbed=proof.table("undisturbed"))
        print(f"      {num_kills} kills, and to the end, in {time.monotonic() - began_s:.1f} s")
        proof.check_nothing_new(tables[-1])
    proof.checks.equal("no worker needs memory for a bomb", proof.peak_worker_bytes < _BOMB_BYTES, True)
    driver_mb, worker_mb = proof.peak_driver_bytes / 1e6, proof.peak_worker_bytes / 1e6
    print(f"      peak memory: driver {driver_mb:.0f} MB, a worker {worker_mb:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
