"""What a stream says, apart from how it was cut into chunks: its text, reasoning, calls and ends, channel by channel.

Two runs of one request have other chunk borders, ids, times, log probabilities and usage; their content can be compared.
A channel is one string that grows: ``0.content``, ``0.tool_calls.1.function.arguments``, ``0.text``, ``0.finish_reason``.
Position and length are counted in characters (code points) over all channels.
"""

from gateway.core.content.continuation import Continuation
from gateway.core.content.cutting import Diverged
from gateway.core.content.leaves import pieces
from gateway.core.content.trace import Skip, Trace, parse_position

__all__ = ["Continuation", "Diverged", "Skip", "Trace", "parse_position", "pieces"]
