"""Who may begin now: the limit, the short wait before it, and the cheap refusal of everything beyond."""

from __future__ import annotations

from plait.rpc.deadline import Deadline
from router.admission import Admission
from router.question import Question, Response, Road


class Gate:
    """Stands in a road where work begins: what is before it costs little, what is behind it is bounded."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def __repr__(self) -> str:
        return f"<Gate {self._admission!r}>"

    @property
    def load(self) -> float:
        """How much of what may be worked on at once is, 0 to 1."""
        return self._admission.load

    def knock(self, deadline: Deadline) -> None:
        """Refuse what could not be let in anyway, before anything is done for it. Raises as `Admission.enter`."""
        self._admission.knock(deadline)

    async def enter(self, deadline: Deadline) -> None:
        """Wait for a turn; whoever got one must `leave`. Raises as `Admission.enter`."""
        await self._admission.enter(deadline)

    def leave(self) -> None:
        """Give the turn on."""
        self._admission.leave()

    def around(self, road: Road) -> Road:
        """Return the road behind the gate."""
        admission = self._admission

        async def gated(question: Question) -> Response:
            await admission.enter(question.deadline)
            question.watch.admitted = question.watch.stamp()
            try:
                return await road(question)
            finally:
                admission.leave()

        return gated
