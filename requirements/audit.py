"""Known vulnerabilities of what the environments install, asked of PyPI by pip-audit.

    python requirements/audit.py requirements/trl.txt requirements/verl.txt

It exits with 1 where there are any, and with 0 where there are none or where that cannot be asked: pip-audit is not installed,
or its data cannot be reached. A line says which. Of packages that are not pinned in these files it asks nothing.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys


def audit(files: list[str]) -> tuple[int, str]:
    """The exit status, and what to print."""
    if importlib.util.find_spec("pip_audit") is None:
        return 0, "audit skipped: pip-audit is not installed (pip install pip-audit)"
    named = [argument for file in files for argument in ("--requirement", file)]
    # The pins as they are: nothing is resolved or installed.
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--no-deps", "--disable-pip", *named]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):  # it has not come to an answer
        said = done.stderr.strip().splitlines() or ["no answer"]
        return 0, f"audit skipped: pip-audit reached no data ({said[-1]})"
    found = [
        f"{package['name']} {package['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no release'}"
        for package in packages
        for fault in package.get("vulns", ())
    ]
    unknown = sum("skip_reason" in package for package in packages)
    counts = f"audit: {len(packages)} packages, {unknown} of them unknown to PyPI, {len(found)} known vulnerabilities"
    return int(bool(found)), "\n".join([counts, *found])


if __name__ == "__main__":
    status, text = audit(sys.argv[1:])
    print(text)
    raise SystemExit(status)
