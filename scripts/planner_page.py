"""Writes the back-tests on Detectron2's model zoo and on gloo into docs/planning.md.

    python scripts/planner_page.py

Run it after ``benchmarks/planner_gloo.py``, or after a change of the planner's model. The tables go
between the markers of the page; the text around them is written by hand.
"""

import datetime
import json
from pathlib import Path

from megdet_d2.planner import command, gloo, zoo
from megdet_d2.planner.back_test import to_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/planning.md"
RECORD = ROOT / "docs/results/planner_back_test.json"
BEGIN = "<!-- The tables below are written by scripts/planner_page.py. -->"
END = "<!-- The tables end here. -->"

NOT_RUN = "## Gloo processes of one machine\n\n**Not run** on an idle machine."


def render(page: str) -> str:
    """Returns ``page`` with the back-tests between its markers.

    Raises:
        ValueError: the page does not have each marker once.
    """
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    parts = [to_text(zoo.back_test()), to_text(gloo.back_test()) if gloo.measured() else NOT_RUN]
    tables = "\n\n".join(parts)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    """Writes the page and the record of all back-tests."""
    PAGE.write_text(render(PAGE.read_text()))
    record = {
        "command": "megdet plan --back-test --json",
        "date": datetime.date.today().isoformat(),
        "hardware": "none: arithmetic, and 26 simulations of 100 updates",
        "tests": [command.to_json(test) for test in command.back_tests()],
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written: {PAGE}, {RECORD}")


if __name__ == "__main__":
    main()
