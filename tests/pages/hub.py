"""Stands in for `hf`: takes the options that the real program has; a download takes what the test has put in
place of the Hub, an upload only looks at the folder.

    python -m tests.pages.hub FOLDER download NAME --local-dir WHERE
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

_REAL = "from huggingface_hub.cli.hf import main; main()"


def main(hub: Path, command: str, words: list[str]) -> int:
    """`hub` has a folder for each repository. Returns the exit status."""
    check_options(command, words)
    if command == "download":
        where = words[words.index("--local-dir") + 1]
        shutil.copytree(hub / words[0], where, dirs_exist_ok=True)
        return 0
    assert command == "upload", f"nothing stands in for hf {command}"
    folder = Path(words[1])
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file(), f"{folder} has no {name}"
    json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return 0


def check_options(command: str, words: list[str]) -> None:
    """Each option must stand in the help of the real command."""
    done = subprocess.run(
        [sys.executable, "-c", _REAL, command, "--help"], capture_output=True, text=True, check=True
    )
    known = done.stdout.replace(",", " ").split()
    unknown = [word for word in words if word.startswith("--") and word not in known]
    assert not unknown, f"hf {command} has no option {unknown[0]}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
