"""What a record says of the software that made it."""

import platform
from functools import cache
from importlib import metadata

DISTRIBUTION = "stableanimator-pp"


@cache
def versions_of(*packages: str) -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide what is written."""
    found = {"python": platform.python_version()}
    for name in (DISTRIBUTION, *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
