"""Who uses which of a few things that a process has, each for one user alone as long as there are enough; knows nothing of what they are.

torch hands out its 32 streams per GPU in turn, for ever: after some loads a new version would get the stream of one that serves, and the
work of that one would end up in the new one's recorded graph. So streams are lent here, and taken back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Loan(Generic[T]):
    """One thing, and the lock that those who share it hold while they use it."""

    def __init__(self, thing: T) -> None:
        self.thing = thing
        self.lock = threading.Lock()
        self.users = 0

    @property
    def shared(self) -> bool:
        """Whether others use it too."""
        return self.users > 1


class Lender(Generic[T]):
    """Lends what `make` returns, which is called as long as it gives something new (None: no more) and everything else is lent."""

    def __init__(self, make: Callable[[list[T]], T | None]) -> None:
        """`make(existing)` returns a thing that is not among the existing ones, or None where there is no other."""
        self._make = make
        self._loans: list[Loan[T]] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Lender users={[loan.users for loan in self._loans]}>"

    def take(self) -> Loan[T]:
        """Return a thing that nobody uses, else a new one, else that with the fewest users."""
        with self._lock:
            loan = min(self._loans, key=lambda each: each.users, default=None)
            if loan is None or loan.users:
                loan = self._another() or loan
            if loan is None:
                raise RuntimeError("there is nothing to lend")
            loan.users += 1
            return loan

    def give_back(self, loan: Loan[T]) -> None:
        """End one use of it."""
        with self._lock:
            loan.users -= 1

    def _another(self) -> Loan[T] | None:
        made = self._make([loan.thing for loan in self._loans])
        if made is None:
            return None
        self._loans.append(Loan(made))
        return self._loans[-1]
