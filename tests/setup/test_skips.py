"""The suite's own rule: a skipped test counts as a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

RULE = (Path(__file__).parents[1] / "conftest.py").read_text()

SKIPS = {
    "test_mark": "@pytest.mark.skip(reason='no moon')\ndef test(): pass",
    "test_condition": "@pytest.mark.skipif(True, reason='no moon')\ndef test(): pass",
    "test_call": "def test(): pytest.skip('no moon')",
    "test_module": "pytest.skip('no moon', allow_module_level=True)",
    "test_fixture": "@pytest.fixture\ndef f(): pytest.skip('no moon')\ndef test(f): pass",
    "test_import": "no_moon = pytest.importorskip('no_moon', reason='no moon')",
}
OTHERS = {
    "test_passes": "def test(): pass",
    "test_known": "@pytest.mark.xfail\ndef test(): assert False",
}


@pytest.mark.parametrize("processes", ["0", "2"])
def test_every_kind_of_skip_fails_and_nothing_else(
    pytester: pytest.Pytester, processes: str
) -> None:
    pytester.makeconftest(RULE.replace('pytest_plugins = ["pytester"]', ""))
    modules = {name: f"import pytest\n{body}" for name, body in (SKIPS | OTHERS).items()}
    pytester.makepyfile(**modules)

    result = pytester.runpytest_subprocess(
        "-n", processes, "--continue-on-collection-errors", "-p", "no:cacheprovider"
    )

    for name in SKIPS:
        result.stdout.fnmatch_lines_random([f"{name}.py*counts as a failure: Skipped: no moon"])
    result.assert_outcomes(passed=1, xfailed=1, failed=1, errors=len(SKIPS) - 1)
