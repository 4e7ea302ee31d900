"""Stop strings on streamed text: found across token borders, never leaked, nothing held back in vain."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until one of `stops` is complete.

    The match that ends first wins, and the longest of those that end together, so the result does not
    depend on how the text was cut into pieces. What is held back is exactly the longest tail that could
    still become a stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes new `text`, returns what may be shown. Sets `stopped` and drops the rest on a match."""
        if not self.stops or not text:
            return text
        buffer = self._held + text
        # A match ends inside the new text: an earlier one would have stopped us already.
        ends = [(at + len(s), -len(s)) for s in self.stops if (at := buffer.find(s)) >= 0]
        if ends:
            end, length = min(ends)
            self.stopped, self._held = True, ""
            return buffer[: end + length]
        keep = max(_overlap(buffer, s) for s in self.stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text still held back, to be shown when the answer ended without a match."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
