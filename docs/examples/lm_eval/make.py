"""python docs/examples/lm_eval/make.py: writes countdown_steps.jsonl beside this file, 64 problems of the tiny model.

`solution` is one right answer of several, so the harness's exact match is below the task's own accuracy.
"""

from __future__ import annotations

import json
from pathlib import Path

from rhythm.tasks import load_task

OPTIONS = {"format": "steps", "numbers": 3, "max_number": 25, "max_target": 99}  # of configs/countdown_tiny.yaml


def main() -> None:
    task = load_task("countdown", OPTIONS)
    rows = [{"prompt": task.prompt(each), "solution": task.solution(each)} for each in task.test[:64]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(__file__).with_name("countdown_steps.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
