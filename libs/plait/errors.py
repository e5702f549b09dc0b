"""Our errors: each class holds its gRPC code, each error a stable reason, and both ends speak google.rpc details.

Domain code raises these; the server's interceptor puts them on the wire once, the client library turns the wire back into them.
Messages are for the reader to act on and never hold secrets, ids of people or feature values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN: Final = "plait"
DETAILS_KEY: Final = "grpc-status-details-bin"

_Detail = TypeVar(
    "_Detail", error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.QuotaFailure, error_details_pb2.RetryInfo
)

_NO_METADATA: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request: `field` is its path in the message (or file:line of a manifest)."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """One bound that was reached: `subject` is whose ("tenant:shop"), the description says which bound and how high it is."""

    subject: str
    description: str


class PlaitError(Exception):
    """Base of all errors a caller may see.

    `reason` is a stable UPPER_SNAKE word for programs, the message a sentence for people, `violations` every problem found in the
    request, `retry_after_s` how long to wait where trying again makes sense, `quota` which bounds were reached.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] = _NO_METADATA,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        quota: Sequence[QuotaViolation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = metadata
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.quota = tuple(quota)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {v.field}: {v.description}" for v in self.violations)]
        return "\n".join(lines)

    def to_status(self) -> status_pb2.Status:
        """Return the google.rpc.Status with ErrorInfo and, where they apply, BadRequest, QuotaFailure and RetryInfo."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        _pack(status, error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata))
        if self.violations:
            fields = [error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description) for v in self.violations]
            _pack(status, error_details_pb2.BadRequest(field_violations=fields))
        if self.quota:
            reached = [error_details_pb2.QuotaFailure.Violation(subject=q.subject, description=q.description) for q in self.quota]
            _pack(status, error_details_pb2.QuotaFailure(violations=reached))
        if self.retry_after_s is not None:
            nanos, seconds = math.modf(max(0.0, self.retry_after_s))
            delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(nanos * 1e9))
            _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
        return status


class InvalidArgument(PlaitError):
    """The request is wrong and stays wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"


class NotFound(PlaitError):
    """What the request names does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(PlaitError):
    """It exists already, and differs."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(PlaitError):
    """The request is fine, the state of the system is not; somebody must change it first."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class Aborted(PlaitError):
    """Lost against a concurrent change; read again, then retry."""

    code = grpc.StatusCode.ABORTED
    default_reason = "ABORTED"


class Unauthenticated(PlaitError):
    """Nobody we know."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(PlaitError):
    """Known, but not allowed."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class ResourceExhausted(PlaitError):
    """Too much at once; `retry_after_s` says when to come back."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(PlaitError):
    """Something behind is away; safe to retry."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(PlaitError):
    """The caller's budget is spent, or cannot suffice."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Unimplemented(PlaitError):
    """Not offered here."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class Cancelled(PlaitError):
    """The caller has gone."""

    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class Internal(PlaitError):
    """A fault of ours."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


_BY_CODE: Final[Mapping[int, type[PlaitError]]] = MappingProxyType(
    {
        cls.code.value[0]: cls
        for cls in (
            InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, Aborted, Unauthenticated, PermissionDenied, ResourceExhausted,
            Unavailable, DeadlineExceeded, Unimplemented, Cancelled, Internal,
        )
    }
)  # fmt: skip


def from_status(code: int, message: str, details: bytes = b"") -> PlaitError:
    """Return the error a gRPC status code, message and serialized google.rpc.Status stand for; unreadable details are ignored."""
    cls = _BY_CODE.get(code, PlaitError)
    status = status_pb2.Status()
    try:
        status.ParseFromString(details)
    except DecodeError:
        return cls(message)
    info = _unpack(status, error_details_pb2.ErrorInfo)
    bad = _unpack(status, error_details_pb2.BadRequest)
    quota = _unpack(status, error_details_pb2.QuotaFailure)
    retry = _unpack(status, error_details_pb2.RetryInfo)
    return cls(
        message,
        reason=info.reason if info else None,
        metadata=dict(info.metadata) if info else _NO_METADATA,
        violations=[Violation(v.field, v.description) for v in bad.field_violations] if bad else (),
        retry_after_s=retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry else None,
        quota=[QuotaViolation(q.subject, q.description) for q in quota.violations] if quota else (),
    )


def from_rpc_error(error: grpc.RpcError) -> PlaitError:
    """Return the typed form of an error raised by a gRPC call (sync or aio)."""
    code: grpc.StatusCode = error.code()
    trailers: Any = error.trailing_metadata() or ()
    details = next((value for key, value in trailers if key == DETAILS_KEY), b"")
    return from_status(code.value[0], error.details() or code.name, details if isinstance(details, bytes) else b"")


def _pack(status: status_pb2.Status, detail: _Detail) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _unpack(status: status_pb2.Status, kind: type[_Detail]) -> _Detail | None:
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            return detail
    return None
