"""Which code a run is trained by: the package's version and, where the user stands in a repository, its commit."""

import subprocess
from pathlib import Path

import ast_dist

_TIMEOUT_S = 10.0


def code_version(folder: Path | str = ".") -> dict[str, str]:
    """{"ast_dist": version, "commit": SHA-1}, the commit with "-dirty" behind it where files differ from it.

    No commit where the folder lies in no repository, there is none yet, or git is not installed.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        told = ""
    return {"ast_dist": ast_dist.__version__, **({"commit": told} if told else {})}
