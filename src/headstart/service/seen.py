"""How often something was seen lately: hashes and times, never texts, and within bounds."""

from __future__ import annotations

from collections import OrderedDict, deque

# Of each shelf; what was not seen for longest is forgotten first.
MOST = 1000


class Seen:
    """Times are seconds of any clock that doesn't go back; `window` says for how long one counts."""

    def __init__(self, window: float) -> None:
        self.window = window
        self._shelves: dict[str, OrderedDict[str, deque[float]]] = {}

    def again(self, shelf: str, what: str, now: float, enough: int) -> bool:
        """Whether it has been seen `enough` times now, this one included; then counting begins anew."""
        seen = self._shelves.setdefault(shelf, OrderedDict())
        times = seen.setdefault(what, deque())
        seen.move_to_end(what)
        if len(seen) > MOST:
            seen.popitem(last=False)
        times.append(now)
        while now - times[0] > self.window:
            times.popleft()
        if len(times) < enough:
            return False
        del seen[what]
        return True
