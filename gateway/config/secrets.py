"""Values that say where a secret is: the name of an environment variable, or the path of a file.

That the secret is there is checked with all else, so that a missing one is listed with all other problems.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from gateway.config.values import why_unreadable


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The context of a validation; one without it looks for no secret and reads no file."""

    environ: Mapping[str, str]
    asks_upstreams: bool
    """In replay mode nobody does, and their secrets need not be there."""


def read_secret(path: str) -> str:
    """Raises `ValueError` in words that show nothing of the path: somebody may have put the secret itself there."""
    try:
        secret = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file that it names cannot be read: {why_unreadable(error)}") from None
    if not secret:
        raise ValueError("the file that it names is empty")
    return secret


def not_both(file: str, info: ValidationInfo) -> str:
    """For the file of a secret that a variable may hold as well, by the same name but for its end."""
    other = (info.field_name or "").removesuffix("file") + "env"
    if file and info.data.get(other):
        raise ValueError(f"{other} is given as well")
    return file


def _is_set(name: str, info: ValidationInfo) -> str:
    if name and info.context and not info.context.environ.get(name, "").strip():
        # Somebody may have put the secret itself here: those are rarely all in capitals.
        shown = name if name.isidentifier() and name.isupper() else "that it names"
        raise ValueError(f"the environment variable {shown} is not set")
    return name


def _is_readable(path: str, info: ValidationInfo) -> str:
    if path and info.context:
        read_secret(path)
    return path


def _if_asked(check: Callable[[str, ValidationInfo], str]) -> AfterValidator:
    def checked(value: str, info: ValidationInfo) -> str:
        return check(value, info) if info.context and info.context.asks_upstreams else value

    return AfterValidator(checked)


Variable = Annotated[str, AfterValidator(_is_set)]
"""The name of an environment variable that holds a secret."""
SecretFile = Annotated[str, AfterValidator(_is_readable)]
"""The path of a file that holds a secret, and nothing else: unlike a variable it can change while the gateway runs."""
UpstreamVariable = Annotated[str, _if_asked(_is_set)]
UpstreamFile = Annotated[str, _if_asked(_is_readable)]
