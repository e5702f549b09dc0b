"""Who is next among those that wait: shares by class and tenant, in predicted milliseconds, so that nobody's flood is another's wait."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, Protocol, TypeVar

Priority = Literal["critical", "normal", "sheddable"]
PRIORITIES: Final[tuple[Priority, ...]] = ("critical", "normal", "sheddable")  # a class is its place here
SHARES: Final = (8.0, 4.0, 1.0)  # of what is served while every class has somebody waiting: the floor of each
_CREDIT_MS: Final = 1.0  # that a flow of weight 1 gets in one round


@dataclass(slots=True, eq=False)
class Guest:
    """Who waits: `cost` in predicted milliseconds; tenants that nobody knows share the name ""."""

    rank: int
    tenant: str
    weight: float
    cost: float


G = TypeVar("G", bound=Guest)


class _Flow(Protocol):
    """What takes turns in a ring."""

    weight: float
    deficit: float

    @property
    def head_cost(self) -> float: ...


F = TypeVar("F", bound=_Flow)


class _Ring(Generic[F]):
    """Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): a flow gets credit when its round comes and spends it while it lasts.

    Where a whole round lets nobody go, the rounds until somebody can are given at once: the work does not depend on how large costs are.
    """

    def __init__(self) -> None:
        self._flows: deque[F] = deque()
        self._credited = False  # whether the first flow has had its credit for this round

    def add(self, flow: F) -> None:
        """Let a flow take part, with no credit of former times."""
        flow.deficit = 0.0
        self._flows.append(flow)

    def drop(self, flow: F) -> None:
        """Take a flow out."""
        if flow is self._flows[0]:
            self._credited = False
        self._flows.remove(flow)

    def pick(self) -> F:
        """Return whose turn it is; the same until it has paid or gone."""
        flows = self._flows
        tried = 0
        while True:
            flow = flows[0]
            if not self._credited:
                flow.deficit += _CREDIT_MS * flow.weight
                self._credited = True
            if flow.deficit >= flow.head_cost:
                return flow
            tried += 1
            if tried % len(flows) == 0:
                self._skip_rounds()
            flows.rotate(-1)
            self._credited = False

    def _skip_rounds(self) -> None:
        """Give every flow the rounds after which the first one can go, less one."""
        rounds = min(math.ceil((flow.head_cost - flow.deficit) / (_CREDIT_MS * flow.weight)) for flow in self._flows) - 1
        if rounds > 0:
            for flow in self._flows:
                flow.deficit += rounds * _CREDIT_MS * flow.weight


@dataclass(slots=True, eq=False)
class _Tenant(Generic[G]):
    """One tenant's guests of one class, first come first served."""

    name: str
    weight: float
    deficit: float = 0.0
    cost: float = 0.0
    guests: OrderedDict[G, None] = field(default_factory=OrderedDict)

    @property
    def head_cost(self) -> float:
        return next(iter(self.guests)).cost


class _Class(Generic[G]):
    """The guests of one class."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.weight = SHARES[rank]
        self.deficit = 0.0
        self.cost = 0.0
        self.count = 0
        self.shares = 0.0  # weights of the tenants that wait
        self.tenants: dict[str, _Tenant[G]] = {}
        self.ring: _Ring[_Tenant[G]] = _Ring()

    @property
    def head_cost(self) -> float:
        return self.ring.pick().head_cost

    def longest(self) -> _Tenant[G]:
        """Return the tenant with most guests for its weight."""
        return max(self.tenants.values(), key=lambda tenant: len(tenant.guests) / tenant.weight)


class FairQueue(Generic[G]):
    """Holds at most `most` guests.

    Two levels of deficit round robin: classes share as SHARES says, the tenants of a class by weight. Whatever somebody does not use goes to
    those who wait; inside a tenant and class it is first come, first served.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._cost = 0.0
        self._classes: tuple[_Class[G], ...] = tuple(_Class(rank) for rank in range(len(SHARES)))
        self._ring: _Ring[_Class[G]] = _Ring()

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<FairQueue {self._count}/{self._most}>"

    def waiting(self, rank: int) -> int:
        """Return how many of a class wait."""
        return self._classes[rank].count

    def push(self, guest: G) -> None:
        """Let a guest wait; the caller has made room."""
        level = self._classes[guest.rank]
        if not level.count:
            self._ring.add(level)
        tenant = level.tenants.get(guest.tenant)
        if tenant is None:
            tenant = level.tenants[guest.tenant] = _Tenant(guest.tenant, guest.weight)
            level.shares += guest.weight
            level.ring.add(tenant)
        tenant.guests[guest] = None
        tenant.cost += guest.cost
        self._add(level, 1, guest.cost)

    def head(self) -> G:
        """Return who is next, of at least one."""
        return next(iter(self._ring.pick().ring.pick().guests))

    def pop(self) -> G:
        """Take out who is next."""
        level = self._ring.pick()
        tenant = level.ring.pick()
        guest = next(iter(tenant.guests))
        level.deficit -= guest.cost
        tenant.deficit -= guest.cost
        self._take(guest, tenant, level)
        return guest

    def remove(self, guest: G) -> bool:
        """Take out a guest that gave up; False when it was not waiting any more."""
        level = self._classes[guest.rank]
        tenant = level.tenants.get(guest.tenant)
        if tenant is None or guest not in tenant.guests:
            return False
        self._take(guest, tenant, level)
        return True

    def victim(self, rank: int, tenant: str, weight: float) -> G | None:
        """Return who has to go for a newcomer to wait when all places are taken; None where it is the newcomer.

        That is the newest of whoever has most waiting for its weight: of a lower class that has more than its share of the places, the lowest
        first, else of the newcomer's own class.
        """
        if not self._most:
            return None
        for level in reversed(self._classes[rank + 1 :]):
            if level.count > self._most * level.weight / sum(SHARES):
                return _newest(level.longest())
        own = self._classes[rank]
        if own.count:
            longest = own.longest()
            mine = own.tenants.get(tenant)
            if len(longest.guests) / longest.weight > ((len(mine.guests) if mine else 0) + 1) / weight:
                return _newest(longest)
        return None

    @property
    def full(self) -> bool:
        """Whether a newcomer needs somebody's place."""
        return self._count >= self._most

    def ahead(self, rank: int, tenant: str, weight: float) -> float:
        """Return the cost, in milliseconds, that is served before a newcomer is: all of its own flow, and of others what they get meanwhile."""
        level = self._classes[rank]
        mine = level.tenants.get(tenant)
        before = 0.0
        if level.count:
            own = mine.cost if mine else 0.0
            shares = level.shares if mine else level.shares + weight
            before = min(level.cost, own * shares / weight)
        shares = sum(c.weight for c in self._classes if c.count or c is level)
        return min(self._cost, before * shares / level.weight)

    def _take(self, guest: G, tenant: _Tenant[G], level: _Class[G]) -> None:
        del tenant.guests[guest]
        tenant.cost -= guest.cost
        if not tenant.guests:
            level.ring.drop(tenant)
            del level.tenants[tenant.name]
            level.shares -= tenant.weight
        self._add(level, -1, -guest.cost)
        if not level.count:
            level.cost = level.shares = 0.0  # (what rounding left)
            self._ring.drop(level)
        if not self._count:
            self._cost = 0.0

    def _add(self, level: _Class[G], count: int, cost: float) -> None:
        level.count += count
        level.cost += cost
        self._count += count
        self._cost += cost


def _newest(tenant: _Tenant[G]) -> G:
    return next(reversed(tenant.guests))
