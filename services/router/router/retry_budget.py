"""How much calling again is worth, so that retries cannot double the load of a service that is going down. Pure.

The token bucket of gRFC A6 ("retry throttling"): a failure costs a token, a success gives a tenth back, and only above half is anything
tried again. Under failures alone that is five retries, then one for every ten successes.
"""

from __future__ import annotations

from typing import Final

_TOKENS: Final = 10.0
_RATIO: Final = 0.1


class RetryBudget:
    """The tokens of one pool, for retries and hedges together."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = _TOKENS

    def __repr__(self) -> str:
        return f"<RetryBudget {self._tokens:.1f}/{_TOKENS:.0f}>"

    @property
    def allows(self) -> bool:
        """Whether a call may be tried again."""
        return self._tokens > _TOKENS / 2

    def failed(self) -> None:
        """Count an attempt that failed."""
        self._tokens = max(0.0, self._tokens - 1.0)

    def succeeded(self) -> None:
        """Count an attempt that was answered."""
        self._tokens = min(_TOKENS, self._tokens + _RATIO)
