"""What environment variables decide.

`ANYGEN_HOME`: the cache, by default the user's cache directory. `ANYGEN_OFFLINE=1` (or `HF_HUB_OFFLINE=1`): nothing
is fetched. `ANYGEN_WHEELS`: a wheel, or a folder of wheels, to take pinned packages from.
"""

import os
from pathlib import Path


def home() -> Path:
    """The cache: `ANYGEN_HOME`, by default the user's cache directory."""
    if chosen := os.environ.get("ANYGEN_HOME"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("anygen", appauthor=False)


def is_offline() -> bool:
    """Whether the user forbids the network."""
    switches = (os.environ.get(name, "") for name in ("ANYGEN_OFFLINE", "HF_HUB_OFFLINE"))
    return any(switch.lower() not in ("", "0", "false", "no", "off") for switch in switches)


def wheels() -> Path | None:
    """`ANYGEN_WHEELS`, if it is set."""
    given = os.environ.get("ANYGEN_WHEELS")
    return Path(given).expanduser() if given else None
