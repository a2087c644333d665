"""The two ways in which input can be bad, and how what comes from it is shown."""


class UserError(Exception):
    """The user can mend it: one line that says what is wrong, where, and how to mend it.

    The command line prints it and exits with code 2.
    """


class SampleError(Exception):
    """One member or modality of a sample cannot be read. A run goes on without it and names it in quarantine.jsonl.

    Attributes:
        reason: a key of `REASONS`.
        detail: free text.
    """

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


REASONS = {
    "decode": "the bytes are not what their name says, or are damaged",
    "text-decode": "the text is not UTF-8",
    "json": "the JSON cannot be parsed",
    "empty": "there is nothing in it: no text, no samples, no pixels",
    "pixel-limit": "the picture's header announces more pixels than the limit",
    "byte-limit": "the member is larger than the limit",
    "duration-limit": "the sound's header announces more seconds than the limit",
    "not-finite": "the sound contains NaN or infinity",
    "crc": "the bytes differ from those that were indexed",
    "read": "the storage did not give the bytes",
    "crash": "reading it crashed a process twice",
    "missing": "a file or URL that a manifest names is not there",
    "copy": "equal content came before",
    "near-copy": "nearly equal content came before",
    "shard": "the archive is damaged: what stands at the named offset is not read",
    "duplicate": "a key or a part of this name came before; the later one is left out",
    "label": "the label is missing, or is not one that the task can learn",
    "alone": "an objective compares it with another sample of its source, and none goes with it",
    "name": "the member's name or type is not one that a sample may have",
}


def printable(text: str) -> str:
    """`text` with backslash escapes for what a terminal would obey rather than show: controls, line ends, reordering.

    Whatever comes from data passes through here before it is printed. The joiners that words of Persian and Indic
    scripts and emoji contain are kept.
    """
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else ascii(c)[1:-1] for c in text)
