"""Lines of bytes that come in pieces."""


class Lines:
    """Puts lines together again; one that is longer than ``longest_bytes`` is not kept, and comes out as None."""

    def __init__(self, longest_bytes: int) -> None:
        self._longest_bytes = longest_bytes
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes | None]:
        """The lines that have ended, without their ends."""
        *ended, rest = data.split(b"\n")
        found = []
        for piece in ended:
            self._keep(piece)
            found.append(self._taken())
        self._keep(rest)
        return found

    def end(self) -> list[bytes | None]:
        """What is left: the last line may lack its end."""
        return [self._taken()] if self._size else []

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._longest_bytes:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def _taken(self) -> bytes | None:
        line = b"".join(self._pieces) if self._size <= self._longest_bytes else None
        self._pieces.clear()
        self._size = 0
        return line
