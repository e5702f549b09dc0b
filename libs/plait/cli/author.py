"""Who runs a command, as the audit log names it."""

from __future__ import annotations

import getpass
import socket


def author() -> str:
    """Return the account and the machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account number without a name, as in many containers
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
