"""python docs/examples/real_model/problems.py COUNT OUT: writes gsm_symbolic problems as prompts of rhythm-analyze."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import reasoning_gym


def main(count: int, out: Path) -> None:
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=0)
    rows = [{"question": each["question"], "answer": each["answer"]} for each in problems]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
