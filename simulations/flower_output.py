"""Tell what the app says from what Flower and Ray write around it.

The app prints, logs and shows progress bars on its own; Flower's records and the clients' lines are of use only
when something has gone wrong, and stand in the log file.
"""

from __future__ import annotations

import re

_record = r"\x1b\[9\dm(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*\x1b\[0m:"
_worker = r"\x1b\[\d+m\(\w+(?: pid=\d+[^)]*)?\)\x1b\[0m "
_command_messages = ("Using SuperLink: ", "Successfully started run ", "Successfully installed ")
_noise = re.compile("|".join([_record, _worker, *map(re.escape, _command_messages)]))
# Records of several lines, and how these go on: indented or empty, or a part of a traceback.
_long_record = re.compile(r"\x1b\[9\dm(WARNING|ERROR)")
_continues_record = re.compile(
    r"[ \t\n]|$"
    r"|Traceback \(most recent call last\)"
    r"|During handling of the above exception|The above exception was the direct cause"
    r"|[\w.]*(Error|Exception|Interrupt|Exit)\b"
    r"|Exception \w+ occurred|(\x1b\[\d+m)?ray::|The actor (died|is dead) "
    r"|An unhandled exception occurred|For more information, visit"
)
# Records also begin in the middle of a progress bar; a worker's own records follow its name.
_piece_end = re.compile(rf"(?<=[\n\r])|(?<!\x1b\[0m )(?={_record})|(?={_worker})")


class AppOutput:
    """Filter a stream of text, piece by piece, down to what the app says.

    What the app writes passes at once, also without the end of its line (progress bars).
    """

    def __init__(self) -> None:
        self._held = ""
        self._line_is_shown = False
        self._in_record = False

    def feed(self, text: str) -> str:
        """Return what of the output so far is to be shown now."""
        *complete, last = [piece for piece in _piece_end.split(self._held + text) if piece] or [""]
        self._held = ""
        if last.endswith(("\n", "\r")):
            complete.append(last)
            last = ""
        return "".join(map(self._pass_complete, complete)) + self._pass_partial(last)

    def flush(self) -> str:
        """Return what is left when the stream ends."""
        rest, self._held = self._held, ""
        return self._pass_complete(rest)

    def _pass_complete(self, line: str) -> str:
        goes_on, self._line_is_shown = self._line_is_shown, False
        if goes_on and not line.startswith("\x1b"):
            return line
        self._in_record = bool(_long_record.match(line) or (self._in_record and _continues_record.match(line)))
        return "" if self._in_record or _noise.match(line) else line

    def _pass_partial(self, text: str) -> str:
        if text.startswith("\x1b") or (not self._line_is_shown and (self._in_record or _may_become_noise(text))):
            self._held = text
            return ""
        self._line_is_shown = self._line_is_shown or text != ""
        return text


def _may_become_noise(text: str) -> bool:
    return any(text.startswith(message) or message.startswith(text) for message in _command_messages)
