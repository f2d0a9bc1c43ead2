"""Removing files that were written and never committed, as by a refresh that was killed."""

import json

from pipelines import storage
from pipelines.data.table.sample_table import OUTCOMES, SampleTable

# Longer than any refresh keeps a shard uncommitted.
_MIN_AGE_S = 24 * 3600.0


def sweep(uri: str, *, now_s: float, min_age_s: float = _MIN_AGE_S) -> int:
    """Deletes files under the table at `uri` that no version of it refers to, and returns how many.

    Files younger than `min_age_s` are left: another refresh may be about to commit them.
    """
    used: set[str] | None = None
    num_deleted = storage.delete_unfinished(uri, older_than_s=min_age_s, now_s=now_s)
    for outcome in OUTCOMES:
        for file in storage.list_files(storage.join(uri, f"outcome={outcome}")):
            # The name begins with a version and a chunk; the log is read only if something is old enough.
            if now_s - storage.modified_s(file) <= min_age_s:
                continue
            used = committed_paths(uri) if used is None else used
            if f"outcome={outcome}/{file.rpartition('/')[2]}" not in used:
                storage.delete(file)
                num_deleted += 1
    return num_deleted


def committed_paths(uri: str) -> set[str]:
    """Returns the files, uncommitted ones left out, of every version that can still be opened.

    The latest version holds what was never removed, and the log every addition and removal since it was last cut.
    """
    paths = {shard.path for shard in SampleTable.open(uri).shards(outcome=None)}
    for file in storage.list_files(storage.join(uri, "_delta_log")):
        if not file.endswith(".json"):
            continue
        for line in storage.read_bytes(file).splitlines():
            action = json.loads(line)
            paths.update(action[kind]["path"] for kind in ("add", "remove") if kind in action)
    return paths
