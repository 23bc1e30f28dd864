"""requirements.lock against requirements.txt."""

import re

from packaging.requirements import Requirement

from conftest import ROOT


def test_the_lock_has_what_requirements_txt_asks_for():
    lines = re.sub(r"#.*", "", (ROOT / "requirements.lock").read_text()).replace("\\\n", "").splitlines()
    locked = {}
    for line in filter(str.strip, lines):
        pin, *hashes = line.split()
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin
        name, version = re.fullmatch(r"([a-z0-9-]+)==(\S+)", pin).groups()
        locked[name] = version
    wanted = re.sub(r"#.*", "", (ROOT / "requirements.txt").read_text()).splitlines()
    required = [Requirement(line) for line in wanted if line.strip() and not line.startswith(("-e", "."))]
    for requirement in required:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            name = "opencv-python-headless" if name == "opencv-python" else name
            assert requirement.specifier.contains(locked[name]), f"{requirement}: run make lock"
    assert "opencv-python" not in locked  # its files are those of opencv-python-headless
