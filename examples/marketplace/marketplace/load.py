"""One load generator in a process of its own, so that it shares no interpreter with what it measures.

`python -m marketplace.load` reads a `Spec` as JSON from its first input line, says "ready", begins at the second line and prints a JSON list
of seconds per call. Bounded in time and in calls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from marketplace import manifests
from marketplace.floor import Floor
from plait.client import RankingClient
from plait.registry.manifests import load
from plait.registry.records import Snapshot

MAX_CALLS: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to do: through the mesh with `callers` concurrent callers, or the floor in a loop; questions are (user, items)."""

    way: str  # "mesh" | "floor"
    seconds: float
    questions: list[tuple[str, list[str]]]
    callers: int = 1
    router: str = ""
    api_key: str = ""
    redis_url: str = ""
    model: str = ""


async def through_mesh(spec: Spec) -> list[float]:
    """Keep `callers` calls under way until the time is up; return the seconds that each answer of the model took."""
    taken: list[float] = []
    async with RankingClient(spec.router, api_key=spec.api_key) as client:
        user, items = spec.questions[0]
        await client.rank(manifests.ROUTE, user, items, timeout_s=10)
        _begin()
        give_up = time.perf_counter() + spec.seconds

        async def caller(number: int) -> None:
            at = number
            while (began := time.perf_counter()) < give_up and len(taken) < MAX_CALLS:
                user, items = spec.questions[at % len(spec.questions)]
                ranking = await client.rank(manifests.ROUTE, user, items, timeout_s=10)
                if ranking.tier == "full":  # (what popularity answers costs nothing, and is not what is measured)
                    taken.append(time.perf_counter() - began)
                at += spec.callers

        await asyncio.gather(*(caller(number) for number in range(spec.callers)))
    return taken


def on_the_floor(spec: Spec) -> list[float]:
    """Answer one question after the other until the time is up; return the seconds each took."""
    taken: list[float] = []
    views = {m.name: m.record for m in load([manifests.FOLDER / "feature-views.yaml"])}
    floor = Floor(spec.redis_url, Snapshot(feature_views=views), Path(spec.model))  # type: ignore[arg-type]
    floor.rank(*spec.questions[0])
    _begin()
    give_up = time.perf_counter() + spec.seconds
    while (began := time.perf_counter()) < give_up and len(taken) < MAX_CALLS:
        floor.rank(*spec.questions[len(taken) % len(spec.questions)])
        taken.append(time.perf_counter() - began)
    floor.close()
    return taken


class Generator:
    """The other end: starts a load generator and collects what it measured."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, spec: Spec) -> Generator:
        """Start it; return once it is ready to begin."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "marketplace.load", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26
        )
        generator = cls(process)
        generator._say(json.dumps(dataclasses.asdict(spec)))
        if await generator._line() != "ready":
            await process.wait()
            raise RuntimeError("the load generator did not start; its error is above")
        return generator

    async def measure(self) -> list[float]:
        """Let it begin; return the seconds per call once it is done."""
        self._say("go")
        taken: list[float] = json.loads(await self._line())
        await self._process.wait()
        return taken

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(f"{text}\n".encode())

    async def _line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101
        return (await self._process.stdout.readline()).decode().strip()


def _begin() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


def main() -> None:
    """Run one spec."""
    spec = Spec(**json.loads(sys.stdin.readline()))
    taken = asyncio.run(through_mesh(spec)) if spec.way == "mesh" else on_the_floor(spec)
    sys.stdout.write(json.dumps(taken) + "\n")


if __name__ == "__main__":
    main()
