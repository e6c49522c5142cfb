"""The commands of README and docs, as a reader would copy them.

The mark behind a fence's language says what a block needs: nothing (it runs here, in order),
`hardware` or `data` that are not here (its flags are parsed), `setup` (it installs), `server` (it
runs until the page ends), `client` (that asks the server), and for Python `run`.
"""

import dataclasses
import re
import shlex
from pathlib import Path

from launch.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MARKS = ("", "hardware", "data", "setup", "server", "client")
_FENCE = re.compile(r"^```(\w*)(?: (\w+))?\n(.*?)^```$", re.M | re.S)
_VARIABLE = re.compile(r"[A-Z_]+=\S*")


@dataclasses.dataclass(frozen=True)
class Block:
    """Attributes:
    language: "sh", "python" or others.
    """

    page: str
    language: str
    mark: str
    text: str

    def commands(self):
        """Its command lines, those that are continued joined."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if shlex.split(line, True)]

    def lines(self):
        """Its command lines in words, without comments."""
        return [shlex.split(line, True) for line in self.commands()]


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, *(part or "" for part in match)) for match in _FENCE.findall(text)]


def module_and_arguments(words):
    """Of a command of ours, by whatever name; None of another one."""
    words = [word for word in words if not _VARIABLE.fullmatch(word)]
    if words[0] == "glm-jax" and words[1] in COMMANDS:
        return COMMANDS[words[1]], words[2:]
    if words[0] == "glm-jax":
        return "launch.__main__", words[1:]
    if words[0].endswith("python") and words[1] == "-m":
        return words[2], words[3:]
    return None
