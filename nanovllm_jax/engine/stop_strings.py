"""Finds the first of several strings in a text that comes in parts."""

from collections.abc import Sequence


class StopStrings:
    """Passes a text on, up to the first stop string in it, and never half a stop string.

    The text ends where, read character by character, it first ends with a stop string; if several
    end there, with the longest. So the outcome does not depend on how the text is cut into parts,
    and what is passed on contains none of the strings. What may become a stop string is held back.

    Args:
        strings: the stop strings; none of them is empty.
        include: pass on the stop string that is found, too.
    """

    def __init__(self, strings: Sequence[str], include: bool = False):
        self._strings, self._include = strings, include
        self._beginnings = frozenset("".join(string[:-1] for string in strings))
        self._held = ""  # the end of the text so far that may become a stop string
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text and return what can be passed on; nothing once a stop string has been found."""
        if self.found is not None:
            return ""
        text, self._held = self._held + text, ""
        ends = [(i + len(s), i, s) for s in self._strings if (i := text.find(s)) >= 0]
        if ends:
            end, start, self.found = min(ends)
            return text[: end if self._include else start]
        held = 0
        if text[-1:] in self._beginnings:  # else no beginning of a stop string ends here
            held = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back; call it once, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest beginning of `string`, less than all of it, that ends `text`."""
    for length in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
