"""tools/check_dockerfile.py reads the Dockerfile as Docker does; its steps are run by hand, as root (see there)."""

from __future__ import annotations

from pathlib import Path

import check_dockerfile
import pytest
from check_dockerfile import Builder, Image, instructions, is_ignored

TEXT = (check_dockerfile.REPOSITORY / "Dockerfile").read_text()
PATTERNS = ["*", "!qwen3fast", "!setup.py", "**/__pycache__"]


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """A builder whose roots are almost empty, and which notes what it would run."""

    class Recorder(Builder):
        ran: tuple = ()

        def fresh_root(self, root):
            (root / "etc").mkdir(parents=True)
            (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nqwen3fast:x:10001:10001::/cache:/bin/sh\n")
            return root

        def run(self, image, command):
            self.ran += ((image, command[-1]),)
            if "pip wheel" in command[-1]:
                (image.root / "wheels").mkdir()
                (image.root / "wheels" / "a.whl").touch()

    return Recorder(tmp_path / "base", tmp_path, ["/etc/pip.conf"], {"TORCH_INDEX": "https://example.org/simple"})


def test_steps_run_in_order_with_their_variables_and_user(builder):
    image = builder.build(TEXT)
    commands = [command for _, command in builder.ran]
    assert [command.split()[0:2] for command in commands] == [
        ["apt-get", "update"], ["pip", "wheel"], ["apt-get", "update"], ["pip", "install"], ["pip", "install"],
        ["useradd", "--uid"],
    ]  # fmt: skip
    assert "\\" not in "".join(commands) and "#" not in "".join(commands)
    assert builder.ran[3][0].arguments == {"TORCH_INDEX": "https://example.org/simple"}
    assert (image.user, image.environment["HOME"]) == ("10001", "/cache")
    assert image.command["ENTRYPOINT"][:4] == ["python", "-m", "qwen3fast", "serve"]
    assert image.command["HEALTHCHECK"][0] == "python" and (image.root / "cache").is_dir()


def test_files_are_copied_as_docker_would(builder):
    image = builder.build(TEXT)
    assert (image.root / "wheels" / "a.whl").is_file()
    source = image.root.parent / "build" / "source"
    assert (source / "qwen3fast" / "server" / "web" / "page.js").is_file() and (source / "pyproject.toml").is_file()
    assert not (source / "tests").exists() and not list(source.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("tests/test_a.py", True), ("qwen3fast/a.py", False), ("qwen3fast/b/c.so", False), ("setup.py", False),
        ("tools/setup.py", True), ("qwen3fast/__pycache__/a.pyc", True),
    ],
)  # fmt: skip
def test_ignored_files(path, ignored):
    assert is_ignored(Path(path), PATTERNS) == ignored


def test_lines_are_joined_and_comments_left_out():
    text = "# one\nFROM a AS b\n\nRUN x \\\n# in between\n    && y\nenv A=1\n"
    assert list(instructions(text)) == [("FROM", "a AS b"), ("RUN", "x && y"), ("ENV", "A=1")]


def test_an_unknown_step_is_refused(builder):
    with pytest.raises(ValueError, match="does not know ONBUILD"):
        builder.build("FROM a\nONBUILD RUN x\n")


def test_commands_run_in_a_root_of_their_own(builder, tmp_path):
    image = Image(tmp_path / "root", {"ARG": "a b"}, {"PATH": "/bin"}, "/source", "10001")
    command = builder.shell(image, ["python", "-c", "print('x y')"])
    assert command[:4] == ["unshare", "--mount", "--pid", "--fork"]
    script = command[-1].splitlines()
    assert script[-1].startswith(f"exec chroot --userspec=10001:10001 {tmp_path / 'root'} env -i 'ARG=a b' PATH=/bin")
    assert f"mount --bind /etc/pip.conf {tmp_path / 'root' / 'etc/pip.conf'}" in script
