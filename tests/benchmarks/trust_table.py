"""The table of the runs that ``trust.py`` has kept."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.trust_verdict import VERDICTS, Findings, verdict

Row = dict[str, Any]


def write_table(path: Path) -> str:
    """
    Writes the Markdown table beside the runs.

    :param path: the ``.jsonl`` file.
    :return: the part that a terminal should show: the counts, and every silent run.
    """
    first, *lines = path.read_text().splitlines()
    header, rows = json.loads(first), [_judged(json.loads(line)) for line in lines]
    if not rows:
        return "there are no runs yet"
    counts = _counts(rows)
    silent = _silent(rows)
    target = path.with_suffix(".md")
    parts = [_introduction(header, rows), counts, "## Silent runs\n\n" + silent, _details(rows), _messages(rows)]
    target.write_text("\n\n".join(parts) + "\n")
    return f"{counts}\n\n{silent}\n\nwritten to {target}"


def _judged(row: Row) -> Row:
    """With the verdict by the limits of today, which need no new run."""
    if "refused" in row:
        return row
    findings = Findings(*(math.inf if row[part] is None else row[part] for part in Findings._fields))
    return {**row, "verdict": verdict(findings, bool(row["warned"]))}


def _introduction(header: Row, rows: Sequence[Row]) -> str:
    seeds, machine = len({row["seed"] for row in rows}), header["machine"]
    right = [row for row in rows if row["verdict"] in ("right", "false alarm")]
    alarms = sum(row["verdict"] == "false alarm" for row in right)
    earlier = "".join(f"\nOf sources {digest}: {which}." for digest, which in header.get("earlier_sources", {}).items())
    return f"""# A first run with the defaults

Written by `python tests/benchmarks/trust.py --table`; it says what the verdicts mean. {len(rows)} runs of
{header["updates"]} updates, up to {seeds} seeds a cell, torch {machine["versions"]["torch"]}, sources {header["sources"]}.
Silent: {sum(row["verdict"] == "SILENT" for row in rows)}. False alarms: {alarms} of {len(right)} good runs
({100.0 * alarms / max(1, len(right)):.1f} %).{earlier}"""


def _counts(rows: Sequence[Row]) -> str:
    groups = _grouped(rows, lambda row: (row["kernel"], _family(row["case"])))
    lines = [("kernel", "model", "runs", *VERDICTS, "worst mean, sd", "worst sd ratio")]
    for (kernel, family), members in groups.items():
        lines.append((kernel, family, len(members), *_verdicts(members), _worst_mean(members), _worst_ratio(members)))
    total = ("all", "", len(rows), *_verdicts(rows), "", "")
    return markdown([*lines, total])


def _silent(rows: Sequence[Row]) -> str:
    lines = [("model", "kernel", "seeds", "mean, sd", "sd ratio", "ESS a chain", "R-hat", "lost", "T_eff")]
    for (case, kernel), members in _grouped((r for r in rows if r["verdict"] == "SILENT"), _cell).items():
        seeds = ", ".join(str(row["seed"]) for row in sorted(members, key=lambda r: r["seed"]))
        lost = max(row["lost"] for row in members)
        numbers = (
            _worst_mean(members),
            _worst_ratio(members),
            _least(members, "ess"),
            _most(members, "r_hat"),
            lost,
            _most(members, "T_eff"),
        )
        lines.append((case, kernel, seeds, *numbers))
    return markdown(lines) if len(lines) > 1 else "None."


def _details(rows: Sequence[Row]) -> str:
    names = (
        "kernel",
        *VERDICTS,
        "worst mean, sd",
        "worst sd ratio",
        "sd ratio, mean",
        "ESS a chain, least",
        "R-hat, most",
        "T_eff, most",
        "ms an update",
    )
    parts = ["## By model"]
    for case, in_case in _grouped(rows, lambda row: row["case"]).items():
        lines = [names]
        for kernel, members in _grouped(in_case, lambda row: row["kernel"]).items():
            numbers = [_worst_mean(members), _worst_ratio(members), _average(members, "sd_mean"), _least(members, "ess")]
            milliseconds = 1e3 * sum(row["seconds"] for row in members) / len(members) / 20_000
            lines.append((kernel, *_verdicts(members), *numbers, _most(members, "r_hat"), _most(members, "T_eff"), f"{milliseconds:.2f}"))
        parts.append(f"### {case}\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def _messages(rows: Sequence[Row]) -> str:
    """What was said how often, numbers left out."""
    seen: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for message in [*row["warned"], *([row["refused"]] if "refused" in row else [])]:
            seen[re.sub(r"\d[\d.e+-]*", "#", message).replace("|", "/").replace("\n", " ")].append(row)
    lines = [("runs", "of them right", "message, numbers left out")]
    for message, members in sorted(seen.items(), key=lambda item: -len(item[1])):
        lines.append((len(members), sum(row["verdict"] == "false alarm" for row in members), message))
    return "## What was said\n\n" + (markdown(lines) if seen else "Nothing.")


# ------------------------------------------------------------------------------------------------------------------- numbers


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items(), key=lambda item: str(item[0])))


def _cell(row: Row) -> tuple[str, str]:
    return row["case"], row["kernel"]


def _family(case: str) -> str:
    """``"linear 200x3"`` of ``"linear 200x3 N/B=4"``."""
    return re.sub(r" (loader )?N/B=\d+| \d+ chains", "", case)


def _verdicts(rows: Sequence[Row]) -> list[int]:
    return [sum(row["verdict"] == name for row in rows) for name in VERDICTS]


def _finished(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "refused" not in row]


def _worst_mean(rows: Sequence[Row]) -> str:
    found = [row["mean"] for row in _finished(rows)]
    return "" if not found else "not finite" if None in found else _short(max(found, key=abs))


def _worst_ratio(rows: Sequence[Row]) -> str:
    found = [row[part] for row in _finished(rows) for part in ("sd_low", "sd_high")]
    return "" if not found else "not finite" if None in found else f"{_short(min(found))} to {_short(max(found))}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0e}"


def _least(rows: Sequence[Row], name: str) -> str:
    found = [row[name] for row in _finished(rows)]
    return f"{min(found):.3g}" if found else ""


def _most(rows: Sequence[Row], name: str) -> str:
    found = [row[name] for row in _finished(rows)]
    return "" if not found else "not finite" if None in found else f"{max(found):.3g}"


def _average(rows: Sequence[Row], name: str) -> str:
    found = [row[name] for row in _finished(rows)]
    return "" if not found else "not finite" if None in found else f"{sum(found) / len(found):.3f}"


def markdown(lines: Sequence[Sequence[Any]]) -> str:
    """A table; the first line is its head."""
    first, *rest = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join([first, "|" + " --- |" * len(lines[0]), *rest])
