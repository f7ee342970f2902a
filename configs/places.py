"""Folders by name: of this machine's file systems, or of an object store (`s3://bucket/folder`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

from anyshard.configs.errors import EnvError

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)")
_LOCAL = ("file", "local")


def is_remote(name: str | os.PathLike[str] | Any) -> bool:
    """Whether a name is that of an object store. A path that pathlib made of one, which has lost a slash, is too."""
    match = _URL.fullmatch(str(name))
    return match is not None and match[1] not in _LOCAL


def place(name: str | os.PathLike[str] | Any) -> Path:
    """The folder or file of that name; one of an object store has the methods of a `Path` that reading needs.

    Raises:
        EnvError: the library for that kind of store is missing.
    """
    if not isinstance(name, (str, Path)):
        return cast(Path, name)  # it is one already
    match = _URL.fullmatch(str(name))
    if match is None:
        return Path(name)
    scheme, rest = match.groups()
    if scheme in _LOCAL:
        return Path("/" + rest)
    try:
        from upath import UPath

        # lists of names are asked for anew each time: other processes write there
        return cast(Path, UPath(f"{scheme}://{rest}", use_listings_cache=False))
    except (ImportError, ValueError) as error:
        raise EnvError(
            f"{name}: this kind of storage needs a library that is not here ({error}). "
            "For s3:// install anyshard[s3]; for others the fsspec implementation of it."
        ) from error


_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs")


def as_env_error(error: BaseException) -> EnvError | None:
    """What a library for object stores could not do, as an error for people; None for an error of another origin."""
    if not any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__):
        return None
    return EnvError(
        f"The object store cannot be used ({type(error).__name__}: {error}). "
        "Look at its address, the credentials and the rights."
    )
