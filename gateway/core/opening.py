"""The beginning of a stream, as long as it says nothing: so long, another call can take its place unnoticed."""

from gateway.core.content import pieces
from gateway.core.dialects.openai import DONE
from gateway.core.recording import MalformedChunk, parse_chunk
from gateway.errors import UpstreamBroke, UpstreamReported

# A server that sends so much without saying anything is not waited for: what it says may not be of a known form.
_MAX_FRAMES = 64
_MAX_BYTES = 65_536


class Opening:
    """What has come of a stream so far, and must be shown before all else."""

    def __init__(self) -> None:
        self.held: list[bytes] = []
        self._frames = self._bytes = 0

    def feed(self, batch: list[bytes]) -> bool:
        """Takes what has come; tells whether it says something by now. What follows that is not looked at.

        Raises `UpstreamReported` and `UpstreamBroke`.
        """
        self.held += batch
        return any(self._speaks(payload) for payload in batch if payload)

    def _speaks(self, payload: bytes) -> bool:
        if payload.startswith(DONE):
            if not self._frames:
                raise UpstreamBroke("The upstream's stream ended without an answer.")
            return True
        try:
            chunk = parse_chunk(payload)
        except MalformedChunk as error:
            raise UpstreamBroke(f"The upstream sent a broken stream: {error}.") from None
        if chunk.get("error"):
            raise UpstreamReported(chunk["error"])
        self._frames += 1
        self._bytes += len(payload)
        return self._bytes > _MAX_BYTES or self._frames >= _MAX_FRAMES or bool(pieces(chunk))
