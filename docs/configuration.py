"""python docs/configuration.py [--write]: prints the configuration's keys, or puts them into docs/configuration.md.

They are read off the typed models, as the commands' --help does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from rhythm.cli import analyze, eval, report, sweep
from rhythm.cli.config_file import example
from rhythm.cli.config_keys import Key, config_keys
from rhythm.cluster.config import ClusterConfig
from rhythm.trainer.config import TrainConfig

DOC = Path(__file__).with_suffix(".md")
HEAD = """# Configuration keys

Made by `python docs/configuration.py --write` from the typed models; each command's `--help` prints the same. A key is
set in the YAML file, section by section, or on the command line as `section.key=value`. An unknown key is an error that
names the nearest known one. WAAD is windowed average attention distance, FAI future attention influence
([numbers.md](numbers.md)). First the keys of `rhythm-train`, then those of [rhythm-eval](#rhythm-eval),
[rhythm-analyze](#rhythm-analyze), [rhythm-sweep](#rhythm-sweep) and [rhythm-report](#rhythm-report).
"""
OTHERS = {
    "rhythm-eval": eval.DEFAULTS,
    "rhythm-analyze": example(analyze.CommandConfig),
    "rhythm-sweep": sweep.EXAMPLE,
    "rhythm-report": report.ReportConfig(),
}


def document() -> str:
    """The whole page."""
    keys = [key for key in config_keys(TrainConfig()) if not key.path.startswith("cluster.")]
    keys += config_keys(ClusterConfig(), "cluster.")
    sections = groupby(keys, key=lambda key: key.path.rpartition(".")[0])
    trained = [_table(name or "run", list(members)) for name, members in sections]
    return HEAD + "".join(trained + [_table(name, list(config_keys(config))) for name, config in OTHERS.items()])


def _table(section: str, keys: list[Key]) -> str:
    rows = "".join(
        f"| `{key.path}` | {_code(key.kind)} | {_code(key.default)} | {_cell(key.meaning)} |\n" for key in keys
    )
    return f"\n## {section}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}"


def _code(text: str) -> str:
    if "<!" in text:  # as in a pattern; Markdown takes it for HTML, also within backticks
        signs = re.sub(r"[|*_\\]", lambda sign: f"&#{ord(sign[0])};", escape(text))
        return f"<code>{signs}</code>"
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python docs/configuration.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/configuration.md instead of printing")
    if parser.parse_args(arguments).write:
        DOC.write_text(document(), encoding="utf-8")
    else:
        print(document())


if __name__ == "__main__":
    main()
