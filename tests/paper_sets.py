"""A few invented rows in the published schema of each of the paper's sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _dapo(n: int) -> dict[str, Any]:
    question = f"Solve it. The last line is of the form Answer: $Answer.\n\nWhat is {n} + {n}?"
    return {
        "data_source": "math_dapo",
        "prompt": _chat(question),
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}"},
    }


def _olympiad(n: int) -> dict[str, Any]:
    return {
        "id": n,
        "question": f"Find $x > 0$ with $x^2 = {n * n}$ or $x = \\sqrt{{{n}}}$.",
        "solution": [f"$x = {n}$."],
        "final_answer": [f"$\\sqrt{{{n}}},{n}$" if n % 2 else f"${n}$"],
        "context": None,
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": bool(n % 2),
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subfield": "Algebra",
        "subject": "Math",
        "language": "English",
    }


def _crossthink(n: int) -> dict[str, Any]:
    letter = n % 2 == 0
    question = f"Which number is even, A) {n} B) {n + 1}?" if letter else f"Which town has the number {n}?"
    return {
        "data_source": "synthetic",
        "prompt": _chat(question),
        "ability": "qa",
        "reward_model": {"ground_truth": "A" if letter else "Old Harbor", "style": "rule"},
        "meta_data": {"index": n, "question": question},
    }


COUNT = 6
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {
            "question": f"Ann has {n} pens and buys 1,000. How many?",
            "answer": f"{n}+1000=<<{n}+1000={n + 1000}>>\n#### 1,00{n}",
        }
        for n in range(COUNT)
    ],
    "dapo_math_17k": [_dapo(n) for n in range(COUNT) for _ in range(3)],
    "crossthink_qa": [_crossthink(n) for n in range(COUNT)],
    "aime24": [
        {
            "id": 60 + n,
            "problem": f"Let $n = {n}$.",
            "solution": "Clear.",
            "answer": f"00{n}",
            "url": "",
            "year": "2024",
        }
        for n in range(COUNT)
    ],
    "aime25": [{"problem": f"Let $n = {n}$.", "answer": str(n), "id": str(n)} for n in range(COUNT)],
    "amc23": [{"id": n, "question": f"Let $n = {n}$.", "answer": f"{n}.0", "url": ""} for n in range(COUNT)],
    "math500": [
        {
            "problem": f"Halve {n}.",
            "solution": f"$\\boxed{{\\frac{{{n}}}{{2}}}}$",
            "answer": f"\\frac{{{n}}}{{2}}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": f"test/{n}.json",
        }
        for n in range(COUNT)
    ],
    "olympiadbench": [_olympiad(n) for n in range(1, COUNT + 1)],
}


def write_rows(name: str, directory: Path) -> Path:
    """The rows of `name` as a JSONL file in `directory`."""
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return path
