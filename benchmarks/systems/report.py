"""The page of all experiments that there are results of, `systems.md`."""

import pathlib
from typing import Any

from benchmarks.systems import (
    bregman,
    costs,
    figures,
    gsm,
    gsm_published,
    logistic,
    lottery,
    records,
)
from benchmarks.systems.records import Claim, Result, Row

# Each module has TITLE, METRICS, Settings, QUICK and the functions run, about, claims
# and draw.
EXPERIMENTS: dict[str, Any] = {
    "logistic": logistic,
    "gsm": gsm,
    "gsm_published": gsm_published,
    "lottery": lottery,
    "bregman": bregman,
    "costs": costs,
}


def settings_of(name: str, result: Result) -> Any:
    """The settings that a result was got with, read back from JSON."""
    known = result.about["settings"].items()
    return EXPERIMENTS[name].Settings(**{key: _tuples(value) for key, value in known})


def _tuples(value: Any) -> Any:
    """JSON has lists where settings have tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def table(rows: list[Row], metrics: dict[str, int]) -> str:
    """Markdown: mean ± standard deviation (range), with the published figures beside.

    Args:
      rows: of the experiment.
      metrics: digits by metric, in the order of the columns; a metric for which
        something is published has a column for it.

    Returns:
      The table.
    """
    columns: dict[str, list[str]] = {"": [row.method for row in rows]}
    for metric, digits in metrics.items():
        columns[metric] = [
            records.spread(row.values[metric], digits) if metric in row.values else ""
            for row in rows
        ]
        if any(metric in row.published for row in rows):
            columns[f"published {metric}"] = [
                row.published.get(metric, "") for row in rows
            ]
    columns["wall time (s)"] = [f"{row.seconds:.1f}" for row in rows]
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(claims: list[Claim]) -> str:
    """Markdown: a line for each claim."""
    return "\n".join(
        f"* **{'yes' if claim.holds else 'NO'}**: {claim.text}: {claim.evidence}."
        for claim in claims
    )


def section(name: str, result: Result, figure: str) -> str:
    """Markdown of one experiment."""
    module, settings = EXPERIMENTS[name], settings_of(name, result)
    about = result.about
    known = about["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
    quick = "**A quick run on small data: no verdict means anything.** "
    seeds = "" if name == "costs" else f"{about['seeds']} seeds, "
    parts = [
        f"## {module.TITLE}",
        f"{quick * about['quick']}`{about['command']}`: {seeds}"
        f"{about['seconds'] / 60:.1f} minutes on {known['backend']} "
        f"({known['architecture']}, {known['cores']} cores; {versions}).",
        module.about(settings),
        table(result.rows, module.METRICS),
        verdicts(module.claims(result.rows, settings)),
        f"![{module.TITLE}]({figure})",
    ]
    return "\n\n".join(part for part in parts if part)


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
    """Makes the figures and the page from the results that are there.

    Args:
      folder: with `<experiment>.json`, as `records.save` wrote them.
      page: the file to write.
    """
    sections = [
        "# The other systems, each on the experiment that its authors report",
        "Cells are the mean ± standard deviation (range) over the seeds, which run "
        "side by side: wall times are those of all seeds of a row together, "
        "compilation included. Beside each stands what the authors publish, where "
        "they publish it.",
    ]
    for name, module in EXPERIMENTS.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        result = records.load(file)
        picture = folder / f"{name}.png"
        figures.write(module.draw, picture, result.rows, result.curves)
        where = picture.relative_to(page.parent).as_posix()
        sections.append(section(name, result, where))
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
