"""Where wandb finds its API key, asked without importing wandb: for the run that starts it and for `anyshard doctor`."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_URL = "https://api.wandb.ai"


@dataclass(frozen=True)
class KeySearch:
    """What looking for a key came to.

    Attributes:
        source: the variable or file that holds the key; None where there is none.
        problem: why a file could not be read, in which there may be one.
    """

    source: str | None = None
    problem: str | None = None


def find_key(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> KeySearch:
    """Look in the environment, then in the netrc file for the host that runs are sent to (`WANDB_BASE_URL`).

    A file that cannot be read holds no key, as wandb takes it too.

    Source: wandb 0.31.0 sdk/lib/wbauth/wbnetrc.py, read_netrc_auth_with_source and _get_netrc_file_path.
    """
    if environ.get("WANDB_API_KEY"):
        return KeySearch("WANDB_API_KEY")
    file = _netrc_file(environ, home or Path.home())
    try:
        entries = netrc.netrc(file)
    except FileNotFoundError:
        return KeySearch()
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        return KeySearch(problem=f"{file} cannot be read ({getattr(error, 'strerror', None) or error})")
    found = entries.authenticators(urlsplit(environ.get("WANDB_BASE_URL") or DEFAULT_URL).netloc)
    return KeySearch(str(file) if found and found[2] else None)


def _netrc_file(environ: Mapping[str, str], home: Path) -> Path:
    if environ.get("NETRC"):
        return Path(environ["NETRC"]).expanduser()
    usual, other = home / ".netrc", home / "_netrc"
    return other if other.exists() and not usual.exists() else usual
