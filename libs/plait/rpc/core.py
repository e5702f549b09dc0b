"""How gRPC's core waits for the network in a plait process; to be chosen before grpc is first imported.

Since 1.80 grpcio reads sockets in threads of its "EventEngine", from where a message takes two more thread hand-overs to an asyncio loop
than with the pollers it had before (https://github.com/grpc/grpc/pull/41432). With the pollers a message over an open stream there and back
takes about 0.6 of the time, and a unary call 0.8. GRPC_EXPERIMENTS is gRPC's own switch; a version that no longer knows a name ignores it.
"""

from __future__ import annotations

import os
from typing import Final

VARIABLE: Final = "GRPC_EXPERIMENTS"
POLLERS: Final = "-event_engine_client,-event_engine_listener"


def use_pollers() -> None:
    """Switch to the pollers unless the operator has set GRPC_EXPERIMENTS. Call it before anything imports grpc."""
    os.environ.setdefault(VARIABLE, POLLERS)
