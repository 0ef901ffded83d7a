"""What a file that comes from elsewhere may ask for: nothing outside of its own folder."""

import re
from pathlib import PurePosixPath

from swiftmeg.errors import UserError


class Untrusted(UserError):
    """A file asks for code, or for what lies outside of its folder: it may be malicious."""


def stays_inside(name: str) -> bool:
    """Whether a path that a file holds leads to something below the file's own folder.

    Links are followed wherever they lead: a file cannot make one, and hubs' caches are made of
    them.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    absolute = path.is_absolute() or bool(re.match(r"[A-Za-z]:", name)) or name.startswith("~")
    return bool(name) and not absolute and ".." not in path.parts and "\0" not in name
