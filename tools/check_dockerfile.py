"""Run the steps of the Dockerfile in fresh root folders, without Docker: each stage in a copy of a base system.

    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm BASE
    python tools/check_dockerfile.py BASE --work FOLDER

Linux, as root: each RUN is a shell in a chroot with namespaces of its own for mounts and processes. BASE stands in for
the image of FROM, with Debian's Python at /usr/local/bin/python. At the end the image's command is started as its user:
it must become ready by its own health check, answer a request, and end at SIGTERM with status 0. What a chroot cannot
show: the base image itself, layers, volumes and limits. `--bind` shows files of this machine in the roots, for example
pip's settings; `--build-arg` sets an ARG. Exit status: 0, or 1 at the first step that fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_S = 300.0
ASK = (
    "import urllib.request as r; print(r.urlopen(r.Request('http://127.0.0.1:8000/v1/completions', "
    'b\'{"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}\')).read().decode())'
)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield the keyword and the rest of each instruction, without comments and with continued lines joined."""
    joined = ""
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not (line.strip() or joined):
            continue
        joined += line.removesuffix("\\").strip() + " "
        if not line.endswith("\\"):
            keyword, _, rest = joined.strip().partition(" ")
            yield keyword.upper(), rest.strip()
            joined = ""


def is_ignored(path: Path, patterns: list[str]) -> bool:
    """Return True if .dockerignore's patterns leave a file out: the last one that matches it or its folders decides."""
    names = [str(path), *(str(parent) for parent in path.parents)][:-1]
    ignored = False
    for pattern in patterns:
        plain = pattern.removeprefix("!").rstrip("/")
        if plain.startswith("**/"):
            matches = any(fnmatch.fnmatchcase(part, plain[3:]) for part in path.parts)
        else:
            matches = any(fnmatch.fnmatchcase(name, plain) and name.count("/") == plain.count("/") for name in names)
        if matches:
            ignored = not pattern.startswith("!")
    return ignored


@dataclass(frozen=True)
class Image:
    """A stage: its root folder, and what its later steps and its container run with."""

    root: Path
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    folder: str = "/"
    user: str = "0"
    command: dict[str, list[str]] = field(default_factory=dict)  # by ENTRYPOINT, CMD and HEALTHCHECK


class Builder:
    """Runs a Dockerfile's instructions."""

    def __init__(self, base: Path, work: Path, binds: list[str], build_args: dict[str, str]) -> None:
        self._base, self._work, self._binds, self._build_args = base, work, binds, build_args
        self._stages: dict[str, Image] = {}

    def build(self, text: str) -> Image:
        """Run all steps. Returns the last stage. Raises: CalledProcessError; ValueError for an unknown step."""
        image = None
        for keyword, rest in instructions(text):
            print(f"{keyword} {rest}", flush=True)
            if keyword == "FROM":
                _, _, name = rest.partition(" AS ")
                image = Image(self.fresh_root(self._work / (name or "final")))
                self._stages[name or "final"] = image
                continue
            assert image is not None, "a Dockerfile begins with FROM"
            image = self._step(image, keyword, rest)
        assert image is not None, "a Dockerfile has a stage"
        return image

    def fresh_root(self, root: Path) -> Path:
        """Return a new copy of the base system, with a `python` as the base image has."""
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", self._base, root], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        if not (root / "usr/local/bin/python").exists():
            self.run(Image(root), ["python3", "-m", "venv", "/usr/local"])
        return root

    def _step(self, image: Image, keyword: str, rest: str) -> Image:
        """Run an instruction. Returns the image after it."""
        if keyword == "ARG":
            name, _, value = rest.partition("=")
            return replace(image, arguments=image.arguments | {name: self._build_args.get(name, value)})
        if keyword == "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(rest))
            return replace(image, environment=image.environment | pairs)
        if keyword == "WORKDIR":
            (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            return replace(image, folder=rest)
        if keyword == "USER":
            entries = [line.split(":") for line in (image.root / "etc" / "passwd").read_text().splitlines()]
            home = next((entry[5] for entry in entries if rest in (entry[0], entry[2])), "/")
            return replace(image, user=rest, environment={**image.environment, "HOME": home})
        if keyword == "COPY":
            self._copy(image, shlex.split(rest))
        elif keyword == "RUN":
            self.run(image, ["/bin/sh", "-c", rest])
        elif keyword == "VOLUME":
            (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif keyword in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
            found = json.loads(rest[rest.index("[") :])
            return replace(image, command=image.command | {keyword: found})
        elif keyword not in ("EXPOSE", "STOPSIGNAL"):
            raise ValueError(f"this check does not know {keyword}")
        return image

    def _copy(self, image: Image, words: list[str]) -> None:
        source, target = words[-2], image.root / image.folder.lstrip("/") / words[-1].lstrip("/")
        if words[-1].startswith("/"):
            target = image.root / words[-1].lstrip("/")
        if words[0].startswith("--from="):
            stage = self._stages[words[0].removeprefix("--from=")]
            shutil.copytree(stage.root / source.lstrip("/"), target, dirs_exist_ok=True)
            return
        patterns = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.strip()]
        for path in (REPOSITORY / source).rglob("*"):
            relative = path.relative_to(REPOSITORY)
            if path.is_file() and not is_ignored(relative, patterns):
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / relative)

    def run(self, image: Image, command: list[str]) -> None:
        """Run a command in an image. Raises: subprocess.CalledProcessError."""
        subprocess.run(self.shell(image, command), check=True)

    def shell(self, image: Image, command: list[str]) -> list[str]:
        """Return the command that runs another one in an image, as its user and in its folder."""
        root = shlex.quote(str(image.root))
        mounts = [f"mount --rbind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
        for path in self._binds:
            target = image.root / path.lstrip("/")
            make = f"mkdir -p {shlex.quote(str(target))}" if Path(path).is_dir() else (
                f"mkdir -p {shlex.quote(str(target.parent))} && touch {shlex.quote(str(target))}"
            )  # fmt: skip
            mounts += [make, f"mount --bind {shlex.quote(path)} {shlex.quote(str(target))}"]
        variables = [f"{name}={value}" for name, value in (image.arguments | image.environment).items()]
        inner = shlex.join(
            ["env", "-i", *variables, "/bin/sh", "-c", f"cd {shlex.quote(image.folder)} && exec {shlex.join(command)}"]
        )
        chroot = f"exec chroot --userspec={image.user}:{image.user} {root} {inner}"
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-ec", "\n".join([*mounts, chroot])]


def serves(builder: Builder, image: Image) -> None:
    """Start an image's command, wait until it is healthy, ask, and end it. Raises: RuntimeError, CalledProcessError."""
    process = subprocess.Popen(builder.shell(image, image.command["ENTRYPOINT"] + image.command["CMD"]))
    try:
        deadline = time.monotonic() + READY_S
        while subprocess.run(builder.shell(image, image.command["HEALTHCHECK"]), stderr=subprocess.DEVNULL).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not become ready")
            time.sleep(1)
        builder.run(image, ["python", "-c", ASK])
        os.kill(child_of(process.pid), signal.SIGTERM)
        if process.wait(60):
            raise RuntimeError(f"the server ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def child_of(pid: int) -> int:
    """Return the only child of a process (Linux)."""
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def main() -> int:
    """Run. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a base system")
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' roots; they stay there")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH", help="shown in the roots as here")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    if wrong := [text for text in args.build_arg if not re.fullmatch(r"\w+=.*", text)]:
        parser.error(f"--build-arg must be NAME=VALUE, got {wrong[0]}")
    builder = Builder(args.base, args.work.resolve(), args.bind, dict(text.split("=", 1) for text in args.build_arg))
    try:
        image = builder.build((REPOSITORY / "Dockerfile").read_text())
        serves(builder, image)
    except (subprocess.CalledProcessError, RuntimeError) as err:
        print(f"FAILED: {err}", file=sys.stderr)
        return 1
    print("all steps passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
