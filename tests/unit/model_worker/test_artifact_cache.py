"""Fetched once, whole or not at all, bounded, and never deleted under somebody who uses it: over a real store, threads, processes and kills."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.object_store import Handler, ObjectStore

from model_worker import file_locks
from model_worker.artifact_cache import ArtifactCache, Held
from plait.errors import PlaitError
from plait.registry import artifact, locations, signing
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import TensorSpec
from plait.registry.signing import Trust
from plait.registry.sources import StoreOptions, open_source

SPEC = TensorSpec(name="x", dtype="float32", shape=(-1, 3))
FREE = Trust(required=False)
OPTIONS = StoreOptions(timeout_s=30, stall_s=10, retries=1, allow_http=True)
ADDRESS = "s3://models/ranker/7"
KEY = "models/ranker/7"
ROOT = Path(__file__).parents[3]  # of the checkout, where tests.fakes is found


def published(folder: Path, weights: bytes = b"weights", **more: bytes) -> str:
    """Write an artifact of model.pt and other files; return its digest."""
    folder.mkdir(parents=True)
    for name, content in {"model.pt": weights, "deep/vocab.txt": b"a\nb\n", **more}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return artifact.write(folder, ArtifactManifest(name="m", format="onnx", entry="model.pt", inputs=(SPEC,), outputs=(SPEC,)))


def pushed(store: ObjectStore, folder: Path, weights: bytes = b"weights") -> str:
    """Put an artifact into the store; return its digest."""
    digest = published(folder, weights)
    for file in folder.rglob("*"):
        if file.is_file():
            store.objects[f"{KEY}/{file.relative_to(folder).as_posix()}"] = file.read_bytes()
    return digest


def cache_in(tmp_path: Path, **options: Any) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache", **{"max_bytes": 1 << 20} | options)


def take(cache: ArtifactCache, digest: str, reference: str | Path = ADDRESS, trust: Trust = FREE) -> Held:
    return cache.acquire(digest, open_source(locations.parse(str(reference), Path.cwd()), OPTIONS), trust)


def reason(cache: ArtifactCache, digest: str, reference: str | Path = ADDRESS, trust: Trust = FREE) -> str:
    with pytest.raises(PlaitError) as refused:
        take(cache, digest, reference, trust)
    return refused.value.reason


def unfinished(cache: ArtifactCache) -> list[str]:
    return [path.name for part in ("partial", "trash") for path in (cache.root / part).iterdir()]


def kept(cache: ArtifactCache) -> set[str]:
    return {path.name.replace("-", ":") for path in cache.root.glob("sha256-*")}


def files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@contextmanager
def process(cache: ArtifactCache, digest: str, reference: str | Path = ADDRESS, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.fakes.cache_process", str(cache.root), str(reference), digest, *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            yield child
        finally:
            child.kill()


def said(child: subprocess.Popen[str]) -> str:
    """Return its one word; what it logs are sentences."""
    assert child.stdout is not None
    return next((line.strip() for line in child.stdout if line.strip().replace("_", "").isalpha()), "")


# --- fetching


def test_an_artifact_is_copied_whole_and_then_served_from_the_copy(tmp_path: Path, object_store: ObjectStore) -> None:
    digest = pushed(object_store, tmp_path / "m")
    cache = cache_in(tmp_path)
    with take(cache, digest).lease as lease:
        assert lease.folder == cache.root / digest.replace(":", "-")
        assert files(lease.folder) == files(tmp_path / "m")
    object_store.objects.clear()
    with take(cache, digest).lease as lease:
        assert files(lease.folder) == files(tmp_path / "m")
    assert all(object_store.asked("GET", f"{KEY}/{name}") == 1 for name in files(tmp_path / "m"))
    assert repr(cache).startswith(f"<ArtifactCache {cache.root} artifacts=1 bytes=")


def test_a_folder_is_copied_too_so_that_nothing_done_to_it_later_matters(tmp_path: Path) -> None:
    digest = published(tmp_path / "m")
    with take(cache_in(tmp_path), digest, tmp_path / "m").lease as lease:
        (tmp_path / "m" / "model.pt").write_bytes(b"changed")
        assert (lease.folder / "model.pt").read_bytes() == b"weights"


def test_a_folder_of_the_cache_itself_is_used_where_it_is(tmp_path: Path) -> None:
    digest, cache = published(tmp_path / "m"), cache_in(tmp_path)
    with take(cache, digest, tmp_path / "m").lease as lease, take(cache, digest, lease.folder).lease as again:
        assert again.folder == lease.folder
        assert kept(cache) == {digest}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda o: o.__setitem__(f"{KEY}/model.pt", b"weightz"), "ARTIFACT_CORRUPT"),
        (lambda o: o.__setitem__(f"{KEY}/model.pt", b"weights and more"), "ARTIFACT_CORRUPT"),
        (lambda o: o.__setitem__(f"{KEY}/model.pt", b"weigh"), "ARTIFACT_CORRUPT"),
        (lambda o: o.__delitem__(f"{KEY}/model.pt"), "ARTIFACT_CORRUPT"),
        (lambda o: o.__setitem__(f"{KEY}/model.yaml", o[f"{KEY}/model.yaml"] + b"\n"), "ARTIFACT_CORRUPT"),
        (lambda o: o.__delitem__(f"{KEY}/model.yaml"), "ARTIFACT_MISSING"),
    ],
)
def test_what_is_not_what_was_published_leaves_nothing(
    tmp_path: Path, object_store: ObjectStore, spoil: Callable[[dict[str, bytes]], None], expected: str
) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    spoil(object_store.objects)
    assert reason(cache, digest) == expected
    assert kept(cache) == set()
    assert unfinished(cache) == []


def test_a_store_in_trouble_leaves_nothing_and_is_asked_again_later(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    object_store.faults[f"{KEY}/model.pt"] = lambda handler, _: (handler.fail(500, "InternalError"), True)[1]
    assert reason(cache, digest) == "ARTIFACT_STORE_UNAVAILABLE"
    assert unfinished(cache) == []
    object_store.faults.clear()
    take(cache, digest).lease.close()


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "g" * 64, "sha256:../" + "a" * 61, "md5:" + "0" * 64])
def test_a_digest_that_is_none_is_refused(tmp_path: Path, digest: str) -> None:
    assert reason(cache_in(tmp_path), digest, tmp_path) == "ARTIFACT_CORRUPT"


def test_an_artifact_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, timeout_s=-1.0)
    assert reason(cache, published(tmp_path / "m"), tmp_path / "m") == "ARTIFACT_FETCH_TIMEOUT"
    assert unfinished(cache) == []


def test_a_worker_that_ends_does_not_wait_for_what_it_fetches(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m", b"w" * 5_000_000), cache_in(tmp_path, max_bytes=10_000_000)
    asked, over = threading.Event(), threading.Event()
    object_store.faults[f"{KEY}/model.pt"] = lambda *_: bool(asked.set() or over.wait()) and False
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(reason, cache, digest)
        asked.wait()
        cache.close()
        over.set()
        assert fetching.result() == "ARTIFACT_FETCH_STOPPED"
    assert unfinished(cache) == []


# --- many at once


def test_threads_that_want_one_artifact_fetch_it_once(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m", b"w" * 300_000), cache_in(tmp_path)
    start = threading.Barrier(8)

    def load() -> Held:
        start.wait()
        return take(cache, digest)

    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        for task in [pool.submit(load) for _ in range(8)]:
            stack.enter_context(task.result().lease)
        assert kept(cache) == {digest}
    assert {object_store.asked("GET", f"{KEY}/{name}") for name in files(tmp_path / "m")} == {1}


def test_processes_that_want_one_artifact_fetch_it_once(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m", b"w" * 300_000), cache_in(tmp_path)
    with ExitStack() as stack:
        children = [stack.enter_context(process(cache, digest)) for _ in range(4)]
        assert [said(child) for child in children] == ["held"] * 4
    assert {object_store.asked("GET", f"{KEY}/{name}") for name in files(tmp_path / "m")} == {1}


def test_a_process_killed_in_the_middle_leaves_nothing_that_is_used(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m", b"w" * 3_000_000), cache_in(tmp_path, max_bytes=4_000_000)
    halfway, over = threading.Event(), threading.Event()

    def stall(handler: Handler, content: bytes) -> bool:
        handler.begin(200, len(content))
        handler.wfile.write(content[:2_000_000])
        halfway.set()
        over.wait()
        handler.close_connection = True
        return True

    object_store.faults[f"{KEY}/model.pt"] = stall
    with process(cache, digest) as child:
        halfway.wait()
        child.send_signal(signal.SIGKILL)
        child.wait()
    over.set()
    object_store.faults.clear()
    assert kept(cache) == set()
    (left,) = unfinished(cache)
    assert left.startswith(digest.removeprefix("sha256:"))
    with take(cache, digest).lease as lease:  # the same artifact: whole, and the leftover's reservation is no obstacle
        assert files(lease.folder) == files(tmp_path / "m")
    assert unfinished(cache) == []


def test_opening_the_cache_deletes_what_dead_processes_left_but_not_what_is_under_way(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    (cache.root / "partial" / f"{'0' * 64}.100.token").mkdir()
    (cache.root / "partial" / f"{'0' * 64}.100.token" / "model.pt").write_bytes(b"half")
    (cache.root / "trash" / "doomed").mkdir()
    asked, over = threading.Event(), threading.Event()
    object_store.faults[f"{KEY}/model.pt"] = lambda *_: bool(asked.set() or over.wait()) and False
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(take, cache, digest)
        asked.wait()
        (under_way,) = (name for name in unfinished(cache_in(tmp_path)))
        assert under_way.startswith(digest.removeprefix("sha256:"))
        over.set()
        fetching.result().lease.close()
    assert unfinished(cache) == []


def test_locks_of_what_is_not_here_do_not_pile_up(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    kept_one = published(tmp_path / "m")
    take(cache, kept_one, tmp_path / "m").lease.close()
    for n in range(3):
        assert reason(cache, f"sha256:{n:064}", tmp_path / "nothing") == "ARTIFACT_MISSING"
    again = cache_in(tmp_path)
    assert {path.stem for path in (again.root / "locks").iterdir()} == {kept_one.removeprefix("sha256:"), "space"}


def test_what_is_under_way_is_not_swept_away_whatever_became_of_its_fetch_lock(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    asked, over = threading.Event(), threading.Event()
    object_store.faults[f"{KEY}/model.pt"] = lambda *_: bool(asked.set() or over.wait()) and False
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(take, cache, digest)
        asked.wait()
        (cache.root / "locks" / f"{digest.removeprefix('sha256:')}.fetch").unlink()  # as who evicts an artifact does
        assert len(unfinished(cache_in(tmp_path))) == 1
        over.set()
        with fetching.result().lease as lease:
            assert files(lease.folder) == files(tmp_path / "m")


def test_what_dead_processes_reserved_is_no_obstacle_to_other_artifacts(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, max_bytes=20_000)
    for name in (f"{'0' * 64}.19000.token", "not of ours"):
        (cache.root / "partial" / name).mkdir()
    digest = published(tmp_path / "m", b"w" * 12_000)
    take(cache, digest, tmp_path / "m").lease.close()
    assert unfinished(cache) == []


def test_folders_that_were_cleaned_away_are_made_again(tmp_path: Path) -> None:
    digest, cache = published(tmp_path / "m"), cache_in(tmp_path)
    shutil.rmtree(cache.root)
    with take(cache, digest, tmp_path / "m").lease as lease:
        assert files(lease.folder) == files(tmp_path / "m")


# --- rot


def test_rot_is_noticed_and_mended_once(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    with take(cache, digest).lease as lease:
        (lease.folder / "model.pt").write_bytes(b"weighs!")
        with (lease.folder / "model.pt").open("rb") as still_open:
            take(cache, digest).lease.close()
            assert still_open.read() == b"weighs!"  # whoever reads the old bytes is not torn away from them
        assert (lease.folder / "model.pt").read_bytes() == b"weights"
    assert object_store.asked("GET", f"{KEY}/model.pt") == 2
    assert unfinished(cache) == []


@pytest.mark.parametrize("name", ["model.pt", "model.yaml", "deep/vocab.txt"])
def test_a_file_that_is_gone_is_rot_too(tmp_path: Path, object_store: ObjectStore, name: str) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    with take(cache, digest).lease as lease:
        (lease.folder / name).unlink()
        take(cache, digest).lease.close()
        assert files(lease.folder) == files(tmp_path / "m")


# --- space


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_artifact_used_longest_ago_goes_first(tmp_path: Path, order: tuple[int, ...]) -> None:
    cache = cache_in(tmp_path, max_bytes=30_000)
    digests = [published(tmp_path / str(n), bytes([n]) * 9_000) for n in range(4)]
    for n in (0, 1, 2, *order, 3):
        take(cache, digests[n], tmp_path / str(n)).lease.close()
    assert kept(cache) == set(digests) - {digests[order[0]]}
    assert len(list((cache.root / "locks").iterdir())) == 2 * 3 + 1
    assert unfinished(cache) == []


def test_closing_counts_as_use(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, max_bytes=20_000)
    digests = [published(tmp_path / str(n), bytes([n]) * 9_000) for n in range(3)]
    with take(cache, digests[0], tmp_path / "0").lease:
        take(cache, digests[1], tmp_path / "1").lease.close()
    take(cache, digests[2], tmp_path / "2").lease.close()
    assert kept(cache) == {digests[0], digests[2]}


def test_many_threads_and_many_artifacts_keep_the_bound(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, max_bytes=30_000)
    digests = [published(tmp_path / str(n), bytes([n]) * 9_000) for n in range(6)]
    start = threading.Barrier(6)

    def loads(first: int) -> int:
        start.wait()
        full = 0
        for step in range(12):
            n = (first + step * step) % 6
            try:
                with take(cache, digests[n], tmp_path / str(n)).lease as lease:
                    assert files(lease.folder) == files(tmp_path / str(n))
            except PlaitError as error:
                assert error.reason == "ARTIFACT_CACHE_FULL"  # noqa: PT017 - five others may hold all there is
                full += 1
            with file_locks.held(cache.root / "locks" / "space"):  # nothing is reserved or deleted meanwhile
                assert sum(path.stat().st_size for path in cache.root.glob("sha256-*/**/*") if path.is_file()) <= 30_000
        return full

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(loads, range(6))) < 6 * 12
    assert unfinished(cache) == []


def test_what_is_in_use_here_or_in_another_process_stays(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, max_bytes=20_000)
    digests = [published(tmp_path / str(n), bytes([n]) * 9_000) for n in range(3)]
    with process(cache, digests[0], tmp_path / "0") as child:
        assert said(child) == "held"
        held = take(cache, digests[1], tmp_path / "1")
        assert reason(cache, digests[2], tmp_path / "2") == "ARTIFACT_CACHE_FULL"
        assert kept(cache) == set(digests[:2])
        child.kill()
        child.wait()
    take(cache, digests[2], tmp_path / "2").lease.close()
    assert kept(cache) == {digests[1], digests[2]}
    held.lease.close()
    held.lease.close()
    assert "closed" in repr(held.lease)


def test_an_artifact_that_is_forgotten_is_let_go(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, max_bytes=10_000)
    first, second = (published(tmp_path / str(n), bytes([n]) * 9_000) for n in range(2))
    held = take(cache, first, tmp_path / "0")
    assert reason(cache, second, tmp_path / "1") == "ARTIFACT_CACHE_FULL"
    del held
    take(cache, second, tmp_path / "1").lease.close()
    assert kept(cache) == {second}


def test_an_artifact_larger_than_the_cache_is_refused_before_it_is_fetched(tmp_path: Path, object_store: ObjectStore) -> None:
    cache = cache_in(tmp_path, max_bytes=20_000)
    small = published(tmp_path / "small")
    take(cache, small, tmp_path / "small").lease.close()
    digest = pushed(object_store, tmp_path / "m", b"w" * 20_001)
    assert reason(cache, digest) == "ARTIFACT_TOO_LARGE"
    assert object_store.asked("GET", f"{KEY}/model.pt") == 0
    assert kept(cache) == {small}


def test_fetches_under_way_count_as_used(tmp_path: Path, object_store: ObjectStore) -> None:
    cache = cache_in(tmp_path, max_bytes=20_000)
    first, second = pushed(object_store, tmp_path / "m", b"w" * 12_000), published(tmp_path / "n", b"n" * 12_000)
    asked, over = threading.Event(), threading.Event()
    object_store.faults[f"{KEY}/model.pt"] = lambda *_: bool(asked.set() or over.wait()) and False
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(take, cache, first)
        asked.wait()
        assert reason(cache, second, tmp_path / "n") == "ARTIFACT_CACHE_FULL"
        over.set()
        fetching.result().lease.close()


def test_a_full_disk_is_named_and_left_as_it_was(tmp_path: Path) -> None:
    """The kernel refuses bytes beyond a file size limit just as it does on a full disk."""
    digest, cache = published(tmp_path / "m", b"w" * 3_000_000), cache_in(tmp_path)
    with process(cache, digest, tmp_path / "m", "1000000") as child:
        assert said(child) == "ARTIFACT_DISK_FULL"
    assert kept(cache) == set()
    assert unfinished(cache) == []


class SmallDisk(ArtifactCache):
    """A cache on a disk that has room for 30 000 bytes, of which what is there is taken."""

    def _free_bytes(self) -> int:
        return 30_000 - sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


def test_what_others_are_still_to_write_is_not_promised_twice(tmp_path: Path, object_store: ObjectStore) -> None:
    cache = SmallDisk(tmp_path / "cache", max_bytes=1 << 30)
    first, second = pushed(object_store, tmp_path / "m", b"w" * 18_000), published(tmp_path / "n", b"n" * 18_000)
    asked, over = threading.Event(), threading.Event()
    object_store.faults[f"{KEY}/model.pt"] = lambda *_: bool(asked.set() or over.wait()) and False
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(take, cache, first)
        asked.wait()
        assert reason(cache, second, tmp_path / "n") == "ARTIFACT_DISK_FULL"
        over.set()
        fetching.result().lease.close()
    take(cache, second, tmp_path / "n").lease.close()  # in the place of the first
    assert kept(cache) == {second}


def test_what_no_disk_can_hold_is_refused_before_it_is_fetched_or_anything_deleted(tmp_path: Path, object_store: ObjectStore) -> None:
    small, cache = published(tmp_path / "small"), cache_in(tmp_path, max_bytes=1 << 62)
    take(cache, small, tmp_path / "small").lease.close()
    pushed(object_store, tmp_path / "m")
    claimed = object_store.objects[f"{KEY}/model.yaml"].replace(b"size_bytes: 7", b"size_bytes: %d" % (1 << 61))
    object_store.objects[f"{KEY}/model.yaml"] = claimed
    assert reason(cache, artifact.digest_of(claimed)) == "ARTIFACT_DISK_FULL"
    assert object_store.asked("GET", f"{KEY}/model.pt") == 0
    assert kept(cache) == {small}


def test_a_folder_that_cannot_be_a_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(PlaitError, match=r"set artifacts\.cache") as refused:
        cache_in(tmp_path)
    assert refused.value.reason == "ARTIFACT_CACHE_UNUSABLE"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=14))
def test_whatever_the_order_the_bound_holds_and_what_is_held_is_whole(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("cache")
    cache = cache_in(tmp_path, max_bytes=25_000)
    digests = [published(tmp_path / str(n), bytes([n]) * (3_000 * n + 1_000)) for n in range(6)]
    held: dict[int, Held] = {}
    for n, keep in steps:
        try:
            found = take(cache, digests[n], tmp_path / str(n))
        except PlaitError as error:
            assert error.reason == "ARTIFACT_CACHE_FULL"  # noqa: PT017 - a full cache is one of two right answers
            continue
        if keep:
            held.setdefault(n, found)
        else:
            found.lease.close()
        assert sum(len(c) for folder in cache.root.glob("sha256-*") for c in files(folder).values()) <= 25_000
        for m, kept_one in held.items():
            assert files(kept_one.lease.folder) == files(tmp_path / str(m))
    for each in held.values():
        each.lease.close()


# --- signatures


PEM, PUBLIC = signing.generate()
TRUST = Trust([str(PUBLIC)], required=True)


def test_an_unsigned_artifact_is_refused_before_anything_else_is_opened(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    assert reason(cache, digest, trust=TRUST) == "SIGNATURE_MISSING"
    object_store.objects[f"{KEY}/model.yaml.sig"] = b"ed25519 nonsense"
    assert reason(cache, digest, trust=TRUST) == "SIGNATURE_INVALID"
    object_store.objects[f"{KEY}/model.yaml.sig"] = signing.sign(object_store.objects[f"{KEY}/model.yaml"], signing.generate()[0])[0]
    assert reason(cache, digest, trust=TRUST) == "SIGNATURE_UNTRUSTED"
    assert object_store.asked("GET", f"{KEY}/model.pt") == 0
    assert kept(cache) == set()


def test_a_signed_artifact_keeps_its_signature(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    object_store.objects[f"{KEY}/model.yaml.sig"] = signing.sign(object_store.objects[f"{KEY}/model.yaml"], PEM)[0]
    take(cache, digest, trust=TRUST).lease.close()
    object_store.objects.clear()
    take(cache, digest, trust=TRUST).lease.close()


def test_what_was_fetched_before_signatures_were_required_is_asked_for_one(tmp_path: Path, object_store: ObjectStore) -> None:
    digest, cache = pushed(object_store, tmp_path / "m"), cache_in(tmp_path)
    take(cache, digest).lease.close()
    assert reason(cache, digest, trust=TRUST) == "SIGNATURE_MISSING"
    object_store.objects[f"{KEY}/model.yaml.sig"] = signing.sign(object_store.objects[f"{KEY}/model.yaml"], PEM)[0]
    with take(cache, digest, trust=TRUST).lease as lease:
        assert (lease.folder / "model.yaml.sig").read_bytes() == object_store.objects[f"{KEY}/model.yaml.sig"]
    assert object_store.asked("GET", f"{KEY}/model.pt") == 1
