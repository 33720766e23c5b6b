"""Check the subject of a commit message: `area: what changed`, at most 72 characters.

python tools/check_commit_subject.py .git/COMMIT_EDITMSG
"""

import re
import sys
from pathlib import Path

LONGEST = 72
SUBJECT = re.compile(r"[\w./,` -]+: \S.*")
MADE_BY_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ")


def problem(message: str) -> str | None:
    """Return what is wrong with a commit message's subject, or None."""
    subject = message.partition("\n")[0].rstrip()
    if subject.startswith(MADE_BY_GIT):
        return None
    if len(subject) > LONGEST:
        return f"the subject has {len(subject)} characters; use at most {LONGEST}, and a body for the rest"
    if not SUBJECT.fullmatch(subject):
        return f"the subject must be `area: what changed`, such as `topk_items: fewer passes`, not {subject!r}"
    return None


if __name__ == "__main__":
    found = problem(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if found:
        sys.exit(f"{sys.argv[1]}: {found}")
