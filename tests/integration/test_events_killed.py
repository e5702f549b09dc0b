"""Consumers killed at any point lose nothing and apply nothing twice: real processes, SIGKILL, a real Redis."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from pathlib import Path

from tests.fakes.event_service import MALL, SHOP, consuming, event_service
from tests.fakes.event_world import LISTINGS, NOW_S, USERS, event

from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb

_ROOT = Path(__file__).parents[2]
_KILLS = 20
_AT_ONCE = 4


async def rows(store: RedisStore, tenant: str) -> list[bytes | None]:
    keys = []
    for view, ids in ((LISTINGS, [f"l{n}" for n in range(9)]), (USERS, [f"u{n}" for n in range(9)])):
        keys += KeySpace.of(tenant, view.entity.type, view.name, view.version).keys(ids)
    return (await store.read(keys, 10)).rows


async def test_consumers_killed_twenty_times_end_where_an_undisturbed_one_does(redis_url: str) -> None:
    chance = random.Random(20)  # noqa: S311
    events = [
        event(
            f"e{n}",
            chance.choice(["view", "like", "rate", "make_offer"]),  # an offer has no price: half of its work, then a dead letter
            at_s=NOW_S - chance.random() * 80_000,
            subject=f"u{chance.randrange(9)}",
            listing=f"l{chance.randrange(9)}",
            value=chance.randrange(100) / 4,
        )
        for n in range(3_000)
    ]
    sent = events + chance.sample(events, 900)
    chance.shuffle(sent)
    async with event_service(redis_url) as service:
        for at in range(0, len(events), 1000):
            await service.publish(events[at : at + 1000], MALL)
        async with consuming(service.consumer(service.source("undisturbed"))):
            while (await service.source("front").backlog_of("mall")).events:
                await asyncio.sleep(0.01)
        for at in range(0, len(sent), 1000):
            await service.publish(sent[at : at + 1000])

        async def killed(number: int) -> None:
            """Let a consumer get on with some events, then kill it amid the next."""
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.fakes.consumer_process", redis_url, f"c{number}", cwd=_ROOT
            )
            try:
                before = (await waiting()).events
                goal = before - chance.randrange(1, 60)
                async with asyncio.timeout(60):
                    while (await waiting()).events > goal:
                        await asyncio.sleep(0)
            finally:
                process.send_signal(signal.SIGKILL)
                await process.wait()
            assert process.returncode == -signal.SIGKILL

        async def waiting():
            return await service.source("front").backlog_of("shop")

        for first in range(0, _KILLS, _AT_ONCE):
            await asyncio.gather(*(killed(first + n) for n in range(_AT_ONCE)))
        left = (await waiting()).events
        assert 0 < left < len(sent)

        survivor = service.source("survivor", claim_after_s=0.05)
        async with consuming(service.consumer(survivor)), asyncio.timeout(60):
            while (await waiting()).events:
                service.now_s += 1  # its next look for what the dead left is due
                await asyncio.sleep(0.02)
        assert None not in await rows(service.store, "shop")
        assert await rows(service.store, "shop") == await rows(service.store, "mall")

        async def dead(metadata: object) -> set[bytes]:
            found, token = set(), ""
            while True:
                page = await service.stub.ListDeadLetters(pb.ListDeadLettersRequest(page_size=1000, page_token=token), metadata=metadata)
                found |= {letter.payload for letter in page.dead_letters}
                token = page.next_page_token
                if not token:
                    return found

        assert await dead(SHOP) == await dead(MALL)
        assert len(await dead(MALL)) == sum(1 for each in events if each.type == event("", "make_offer").type)
