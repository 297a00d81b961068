"""English text of Debian packages: which packages, how they are fetched without root, and their documents.

Packages come through `apt-get download` and are unpacked by `dpkg-deb -x` into a folder, never installed.
A document is a file, or a part of one (a book of the Bible).
"""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Files of a Debian package. pattern: a glob in its /usr/share. form: the markup, as in english_prose.FORMS."""

    package: str
    pattern: str
    form: str = "html"


SOURCES = (
    Source("anarchism", "doc/anarchism/html/*.html"),
    Source("sword-text-kjv", "sword/modules/texts/ztext/*/*.bzz", "sword"),
    Source("dict-gcide", "dictd/gcide.dict.dz", "dictionary"),
    Source("dict-devil", "dictd/devil.dict.dz", "dictionary"),
    Source("dict-foldoc", "dictd/foldoc.dict.dz", "dictionary"),
    Source("fortunes", "games/fortunes/*", "plain"),
    Source("jargon-text", "doc/jargon-text/jargon.txt.gz", "dictionary"),
    Source("miscfiles", "state/*.gz", "plain"),
    Source("debian-handbook", "doc/debian-handbook/html/en-US/*.html"),
    Source("debian-faq", "doc/debian/FAQ/*.en.html"),
    Source("debian-history", "doc/debian-history/docs/*.en.html"),
    Source("debian-policy", "doc/debian-policy/policy.html/*.html"),
    Source("debian-reference-en", "debian-reference/*.en.html"),
    Source("developers-reference", "developers-reference/*.html"),
    Source("debmake-doc", "doc/debmake-doc/html/*.en.html"),
    Source("python3.11-doc", "doc/python3.11/html/**/*.html"),
    Source("python-django-doc", "doc/python-django-doc/html/**/*.html"),
    Source("perl-doc", "perl/*/pod/*.pod", "pod"),
    Source("git-doc", "doc/git-doc/**/*.html"),
    Source("linux-doc-6.1", "doc/linux-doc-6.1/html/**/*.html"),
    Source("postgresql-doc-15", "doc/postgresql-doc-15/html/*.html"),
    Source("sqlite3-doc", "doc/sqlite3/**/*.html"),
    Source("gimp-help-en", "gimp/2.0/help/en/*.html"),
    Source("freedombox-doc-en", "freedombox/manual/en/*.html"),
)


def fetch(source: Source, folder: Path) -> tuple[Path, dict[str, str | int]]:
    """Download and unpack a package into `folder`, unless it is there.

    Returns: the unpacked package, and its name, version and size.
    Raises: FileNotFoundError without Debian's tools; subprocess.CalledProcessError where the package is not found.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FileNotFoundError("apt-get and dpkg-deb are needed: run this on Debian or a derivative of it")
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(packages.glob(f"{source.package}_*.deb"))):
        subprocess.run(["apt-get", "download", "-qq", source.package], cwd=packages, check=True, capture_output=True)
        found = sorted(packages.glob(f"{source.package}_*.deb"))
    unpacked = folder / "unpacked" / source.package
    if not unpacked.exists():
        subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(unpacked)], check=True)
    fields = ["dpkg-deb", "-f", str(found[-1]), "Version"]
    version = subprocess.run(fields, check=True, capture_output=True, text=True).stdout.strip()
    return unpacked, {"package": source.package, "version": version, "bytes": found[-1].stat().st_size}


def documents(source: Source, unpacked: Path) -> Iterator[tuple[str, str]]:
    """Yield the names and texts, with their markup, of a source's documents, in the order of their names."""
    share = unpacked / "usr" / "share"
    for path in sorted(share.glob(source.pattern)):
        if path.is_symlink() or not path.is_file():
            continue
        name = f"{source.package}/{path.relative_to(share)}"
        if source.form == "sword":
            for number, text in enumerate(_sword_books(path)):
                yield f"{name}#{number}", text
        else:
            read = gzip.open if path.suffix in (".gz", ".dz") else open
            with read(path, "rb") as file:
                yield name, file.read().decode("utf-8", errors="replace")


def _sword_books(path: Path) -> Iterator[str]:
    """Yield the compressed blocks of a SWORD text module: entries (offset, size, unpacked size) in the .bzs file."""
    data, table = path.read_bytes(), path.with_suffix(".bzs").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", table):
        yield zlib.decompress(data[offset : offset + size]).decode("utf-8", errors="replace")
