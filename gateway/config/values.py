"""What sections are made of: the kinds of values, and the checks that several of them share.

No message shows a value that may hold a secret.
"""

import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
RateOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Slowdown = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DottedPath = Annotated[str, Field(pattern=r"^[^.]+(\.[^.]+)*$")]

NO_URL = "is not a URL: what is odd in a password must be percent-encoded"


class Section(BaseModel):
    """A table of the file: its keys, and their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def split_url(url: str) -> SplitResult:
    """Raises `ValueError`, which shows nothing of the URL: the part that does not parse may be a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(NO_URL) from None
    return parts


def host_and_port(listen: str) -> tuple[str, int]:
    """Raises `ValueError`."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):([0-9]{1,5})", listen)
    if not found or int(found[3]) > 65535:
        raise ValueError('must be a host and a port: "127.0.0.1:9090", "[::1]:9090"')
    return found[1] or found[2], int(found[3])


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Why a file could not be read as text, without its path."""
    return str(error.strerror) if isinstance(error, OSError) else "it is not UTF-8"
