"""A process that fetches artifacts into a cache: python -m tests.fakes.cache_process CACHE ARTIFACT DIGEST [MAX_FILE_BYTES].

Prints "held" once it holds the artifact and keeps it until its stdin ends; prints the error's reason where it is refused.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from model_worker.artifact_cache import ArtifactCache
from plait.errors import PlaitError
from plait.registry import locations
from plait.registry.signing import Trust
from plait.registry.sources import StoreOptions, open_source


def main() -> None:
    root, reference, digest, *limit = sys.argv[1:]
    cache = ArtifactCache(Path(root), max_bytes=1 << 30)
    source = open_source(locations.parse(reference, Path.cwd()), StoreOptions(allow_http=True, retries=0))
    for most_bytes in map(int, limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        held = cache.acquire(digest, source, Trust(required=False))
    except PlaitError as error:
        _say(error.reason)
        return
    _say("held")
    sys.stdin.read()
    held.lease.close()


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
