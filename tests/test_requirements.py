"""requirements.txt against requirements.lock and against what the packages say of themselves."""

import re
from importlib.metadata import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from conftest import ROOT


def requirements() -> list[Requirement]:
    lines = re.sub(r"#.*", "", (ROOT / "requirements.txt").read_text()).splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith(("-e", "."))]


def test_every_pin_can_be_installed_on_the_oldest_python():
    for requirement in requirements():
        installed = metadata(requirement.name)
        if requirement.marker is None and requirement.specifier.contains(installed["Version"]):
            assert SpecifierSet(installed["Requires-Python"] or "").contains("3.10"), requirement


def test_the_lock_has_what_requirements_txt_asks_for():
    lines = re.sub(r"#.*", "", (ROOT / "requirements.lock").read_text()).replace("\\\n", "").splitlines()
    locked = {}
    for line in filter(str.strip, lines):
        pin, *hashes = line.split()
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin
        name, version = re.fullmatch(r"([a-z0-9-]+)==(\S+)", pin).groups()
        locked[name] = version
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            name = "opencv-python-headless" if name == "opencv-python" else name
            assert requirement.specifier.contains(locked[name]), f"{requirement}: run make lock"
    assert "opencv-python" not in locked  # its files are those of opencv-python-headless
