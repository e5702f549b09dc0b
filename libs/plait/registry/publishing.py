"""Handing an artifact over: proving that it is whole, signing it, and putting it where workers fetch it from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from plait.errors import AlreadyExists, FailedPrecondition, PlaitError
from plait.registry import artifact, self_test, signing
from plait.registry.artifact import ArtifactManifest, FileDigest
from plait.registry.locations import Location, Prefix
from plait.registry.problems import Problem, refusal
from plait.registry.signing import PublicKey, Signed, Trust
from plait.registry.sources import FolderSource, Source, StoreOptions, open_source, read_manifest, read_signature, verified

if TYPE_CHECKING:
    from plait.registry.object_store import Bucket

CLAIM: Final = "model.yaml.push"  # beside model.yaml while it is pushed: the digest of what is on its way
Progress = Callable[[int], object]  # told how many bytes more are done


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What lies at a location: the bytes of `model.yaml`, what they say, and who signed them, if anybody did (checked by `verify` only)."""

    location: Location
    content: bytes
    manifest: ArtifactManifest
    signature: bytes | None

    @property
    def digest(self) -> str:
        return artifact.digest_of(self.content)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.manifest.files.values())

    @property
    def signed(self) -> Signed | None:
        """Raises FailedPrecondition (SIGNATURE_INVALID)."""
        return signing.parse(self.signature) if self.signature is not None else None


def describe(location: Location, options: StoreOptions) -> Described:
    """Read `model.yaml` and its signature, and nothing else. Raises as `Source` does, and FailedPrecondition (ARTIFACT_INVALID)."""
    source = open_source(location, options)
    content = read_manifest(source)
    manifest = artifact.parse(content, source=f"{source}/{artifact.FILE_NAME}")
    return Described(location=location, content=content, manifest=manifest, signature=read_signature(source))


def verify(found: Described, options: StoreOptions, trust: Trust, progress: Progress) -> None:
    """Check the signature where one is required, then every byte, then that the self test is one a worker can run.

    Raises FailedPrecondition: SIGNATURE_…, SELF_TEST_UNUSABLE, ARTIFACT_CORRUPT with every file that differs, and as `Source` does.
    """
    if trust.required:
        trust.check(found.content, found.signature)
    source = open_source(found.location, options)
    problems: list[Problem] = []
    for name, expected in found.manifest.files.items():
        try:
            for chunk in verified(source, name, expected):
                progress(len(chunk))
        except FailedPrecondition as error:
            if error.reason != "ARTIFACT_CORRUPT":
                raise
            problems.append(Problem(where=name, message=error.metadata.get("problem", error.message)))
    if problems:
        advice = " (if it was changed on purpose, pack it again with --replace)" if isinstance(found.location, Path) else ""
        what = f"the artifact at {found.location} is not what was published{advice}"
        raise refusal(FailedPrecondition, problems, what, reason="ARTIFACT_CORRUPT")
    _check_self_test(source, found.manifest)


def _check_self_test(source: Source, manifest: ArtifactManifest) -> None:
    if manifest.self_test is None:
        return
    expected = manifest.files[manifest.self_test.file]
    if expected.size_bytes > self_test.MAX_BYTES:
        raise self_test.unusable(f"it is {expected.size_bytes} bytes large, at most {self_test.MAX_BYTES} are allowed: publish fewer rows")
    self_test.check(b"".join(verified(source, manifest.self_test.file, expected)), manifest)


def sign(folder: Path, private_pem: bytes) -> PublicKey:
    """Write `model.yaml.sig` for an artifact whose files are what its `model.yaml` says; return the public key.

    Raises as `describe` and `verify` do, FailedPrecondition (ARTIFACT_UNWRITABLE), InvalidArgument (PRIVATE_KEY_INVALID).
    """
    content = read_manifest(FolderSource(folder))
    signature, public = signing.sign(content, private_pem)
    manifest = artifact.parse(content, source=str(folder / artifact.FILE_NAME))
    found = Described(location=folder, content=content, manifest=manifest, signature=None)
    verify(found, StoreOptions(), Trust(required=False), lambda _: None)
    artifact.write_whole(folder / signing.FILE_NAME, signature)
    return public


def push(folder: Path, to: Prefix, options: StoreOptions, progress: Progress) -> Described:
    """Upload an artifact; `model.yaml` comes last, so that until all of it is there nobody sees any of it. Return what lies there then.

    The same artifact may be pushed again: what is missing (a signature, say) is added. Every byte is hashed on its way, so that a file
    changed meanwhile is noticed. Raises AlreadyExists (ARTIFACT_EXISTS) where another one is there or on its way there, and as `describe`
    and `verify` do.
    """
    from plait.registry.object_store import Bucket  # noqa: PLC0415 - whoever has folders only needs no object store's library

    found, bucket = describe(folder, options), Bucket(to, options)
    if found.signature is not None:
        signing.parse(found.signature)  # before anything is sent
    if not _is_there(bucket, found):
        with _claimed(bucket, found):
            if not _is_there(bucket, found):  # it may have come before the claim
                for name, expected in found.manifest.files.items():
                    bucket.write(name, _reported(FolderSource(folder), name, expected, progress), expected.size_bytes)
                _write_signature(bucket, found)
                _create_manifest(bucket, found)
    else:
        _write_signature(bucket, found)
    return describe(to, options)


@contextlib.contextmanager
def _claimed(bucket: Bucket, found: Described) -> Iterator[None]:
    """Keep others from uploading another artifact to the same place, whose files would end up among ours: who is first to create the claim may
    write, and whoever pushes the very same artifact. One that a killed process left is deleted by pushing that artifact again."""
    mine = found.digest.encode()
    try:
        bucket.create(CLAIM, mine)
    except AlreadyExists as error:
        if _claim_in(bucket) != mine:
            message = (
                f"another artifact is being pushed to {bucket}, or was and is not complete: push this one to a folder of its own, or delete "
                f"{CLAIM} there if nobody is at it any more"
            )
            raise AlreadyExists(message, reason="ARTIFACT_EXISTS") from error
    try:
        yield
    finally:
        with contextlib.suppress(
            PlaitError
        ):  # who may write may not always delete; once model.yaml is there the claim says nothing any more
            bucket.delete(CLAIM)


def _claim_in(bucket: Bucket) -> bytes:
    try:
        return bucket.read(CLAIM, 100)
    except FailedPrecondition as error:
        if error.reason != "ARTIFACT_MISSING":  # whose it was is done just now
            raise
        return b""


def _is_there(bucket: Bucket, found: Described) -> bool:
    """Say whether the artifact is there, whole. Raises AlreadyExists (ARTIFACT_EXISTS) where another one is."""
    there = _manifest_in(bucket)
    if there not in (None, found.content):
        message = f"another artifact is at {bucket}: what is published is never changed; push this one to a folder of its own"
        raise AlreadyExists(message, reason="ARTIFACT_EXISTS")
    return there is not None


def _create_manifest(bucket: Bucket, found: Described) -> None:
    try:
        bucket.create(artifact.FILE_NAME, found.content)
    except AlreadyExists:
        if not _is_there(bucket, found):  # ours: an answer that was lost on its way, or somebody who pushed the same
            raise


def _write_signature(bucket: Bucket, found: Described) -> None:
    if found.signature is not None:
        bucket.write(signing.FILE_NAME, iter((found.signature,)), len(found.signature))


def _reported(source: Source, name: str, expected: FileDigest, progress: Progress) -> Iterator[bytes]:
    for chunk in verified(source, name, expected):
        progress(len(chunk))
        yield chunk


def _manifest_in(source: Source) -> bytes | None:
    try:
        return read_manifest(source)
    except FailedPrecondition as error:
        if error.reason != "ARTIFACT_MISSING":
            raise
        return None
