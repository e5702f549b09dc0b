"""Questions as the page asks them, without a server or anything behind it."""

from __future__ import annotations

from typing import Any

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.registry.records import Snapshot
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline
from router.asking import Asking
from router.question import Question
from router.route_table import compile_table
from router.stopwatch import Stopwatch


def strings(*values: str) -> types_pb2.EntityIds:
    return types_pb2.EntityIds(string_ids=values)


def rank(subject: str = "u1", candidates: tuple[str, ...] = ("i1", "i2", "i3"), **fields: Any) -> pb.RankRequest:
    return pb.RankRequest(**{"route": "home", "subject": strings(subject), "candidates": strings(*candidates), **fields})


def ask(snapshot: Snapshot, request: Any, *, tenant: str = "shop", caller: str = "k1", timeout_s: float = 60.0) -> Question:
    """Make this the current call, and return its question."""
    call = Call(method="m", tenant=tenant, caller=caller, scopes=frozenset({"rank"}), deadline=Deadline.after(timeout_s))
    enter(call)
    asking, table = Asking(1 << 24), compile_table(snapshot)
    make = asking.rank if isinstance(request, pb.RankRequest) else asking.predict
    return make(request, table, call, Stopwatch())
