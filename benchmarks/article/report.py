"""One page of all results: claims, tables and figures, `article.md`."""

import pathlib

from benchmarks.article import checks, claims, figures, tables
from benchmarks.article.methods import SETTINGS
from benchmarks.article.results import Results
from benchmarks.article.runs import STARTS
from prunadag_optax._common.tables import to_csv

# Written by `python -m benchmarks.archive.readings`, beside the page.
READINGS = "../archive/results/readings.md"

TITLES = {
    "least_squares": "Random least squares",
    "sparco": "SPARCO",
    "sparse_coding": "Sparse coding",
    "classification": "Binary classification",
}

_TABLES = {
    "least_squares": (
        "table_2_least_squares",
        tables.table_2,
        "rho",
        "Table 2: rho. Mean ± standard deviation (median) over the runs; below it the "
        "article's mean, where it is at hand, and the measured mean in units of it.",
    ),
    "sparco": (
        "table_3_sparco",
        tables.table_3,
        "rho",
        "Table 3: rho. Mean ± standard deviation (median) over the runs. The published "
        "figures are not at hand; the claim on them is above.",
    ),
    "classification": (
        "table_4_classification",
        tables.table_4,
        "accuracy",
        "Table 4: test accuracy (%). Mean ± standard deviation over the runs; below it "
        "the article's mean, where it is at hand, and the difference in points. "
        "Musk1 is Musk, version 1, which the article's MOLECULE is taken to be. "
        "gisette_like is not GISETTE, so the article's figures of that stand alone in "
        "benchmarks/article/published.py.",
    ),
}


# On the exceptions in the setting "published".
EXPLAINED = """What there is to say of the exceptions:

* v3 on A1 and A2, v2 on A2: where some runs converge and others do not, the mean is
  decided by the largest few, and means over 20 other runs lie far apart (readings.md,
  "Means of v3").
* MNIST with 700 of the 1,000 digits for training: almost every method is above the
  article by about the same, Frank-Wolfe too, which has neither weights nor classes. So
  it is the data and not the methods; with 300 for training, "MNIST 30:70", almost all
  are at its figures. The other data agree as they are split in the text.
* Adagrad on REGED0, A9A and, at 95%, MNIST, and FW1 on A2 at 60%: not explained.
  Adagrad's rows on A1 and A2 agree.
* The others miss the bound by less than two standard errors."""


def _about(results: Results) -> str:
    """The commands, how long they took, where, and what was left out."""
    lines = []
    environments: dict[str, list[str]] = {}
    for name, family in results.items():
        about = family.about
        quick = "**A quick run, of few iterations: no verdict means anything.** "
        lines.append(
            f"* {TITLES[name]}: {quick * about['quick']}`{about['command']}`, "
            f"{about['runs']} runs, {about['seconds'] / 60:.1f} minutes for this family"
        )
        for problem, reason in about["missing"].items():
            lines.append(f"  * without {problem}: {reason}")
        known = about["environment"]
        versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
        where = f"{known['backend']}, {known['architecture']}, {known['cores']} cores"
        environments.setdefault(f"{where}; {versions}", []).append(TITLES[name])
    for where, titles in environments.items():
        lines.append(f"* On {where} ({', '.join(titles)}).")
    return "\n".join(lines)


def _setting(name: str) -> str:
    """What was run, and where the other setting's page is."""
    start, zeta, shift = SETTINGS[name]
    step = "1/(k+1)" if shift == 1 else f"{shift:g}/(k+{shift:g})"
    why = {
        "published": "Under these settings the published rows come out; the text says "
        "T nonzeros, zeta = 0.01 (but zeta under the root in (16), which is this) and "
        "1/(k+1). The same experiments as the text has them: `--setting written`.",
        "written": "These are the article's words; its figures are those of other "
        "settings: [article.md](article.md).",
    }
    return (
        f"Setting: starts of {STARTS[start]}, scaled to length 1; weights that begin "
        f"at {zeta:g}; steps {step} of FW1, k from 0. {why[name]}"
    )


def _claims(results: Results) -> str:
    found = list(enumerate(claims.claims(results), 1))
    judged = [
        {
            "": str(i),
            "family": TITLES[claim.source],
            "claim": claim.text,
            "verdict": f"**{claim.verdict}**",
            "evidence": claim.evidence,
        }
        for i, claim in found
    ]
    exceptions = [
        {
            "": str(i),
            "cell": check.name,
            "measured mean, and the article's": check.figures,
        }
        for i, claim in found
        if claim.counted
        for check in claim.exceptions
    ]
    lines = [tables.plain(judged, list(judged[0])), "", "What is checked:", ""]
    lines += [f"{i}. {claim.rule}." for i, claim in found]
    if exceptions:
        lines += ["", "Exceptions, cell by cell:", ""]
        lines.append(tables.plain(exceptions, list(exceptions[0])))
    return "\n".join(lines)


def _family(name: str, results: Results, folder: str, drawn: list[str]) -> str:
    family = results[name]
    parts = [f"## {TITLES[name]}"]
    if name in _TABLES:
        _, table, quantity, note = _TABLES[name]
        parts += [note, tables.markdown(table(family), quantity)]
    quantity = "accuracy" if name == "classification" else "rho"
    parts += [
        f"The best mean {quantity} at each sparsity; in brackets the percentage of "
        "the runs in which that method was best.",
        tables.ranking_markdown(tables.ranking(family, quantity)),
    ]
    parts += [
        f"![{figure}]({folder}/{figure}.png)"
        for figure in drawn
        if figures.FIGURES[figure][0] == name
    ]
    return "\n\n".join(parts)


def write(
    results: Results, page: pathlib.Path, folder: pathlib.Path, setting: str
) -> None:
    """Writes the page, the tables as CSV and the figures as PNG.

    Args:
      results: the families that were run.
      page: of the Markdown file.
      folder: for the tables and figures, beside the page.
      setting: of the runs, a key of `methods.SETTINGS`.
    """
    drawn = figures.draw(results)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    for name, family in results.items():
        if family.problems:
            quantity = "accuracy" if name == "classification" else "rho"
            ranking = tables.columns(tables.ranking(family, quantity))
            to_csv(ranking, folder / f"ranking_{name}.csv")
            if name in _TABLES:
                file, table, *_ = _TABLES[name]
                columns = tables.columns(table(family))
                to_csv(columns, folder / f"{file}.csv")
    parts = [
        "# The article's experiments",
        "M. Porcelli, G. Seraghiti, Ph. L. Toint, prunAdag: an adaptive pruning-aware "
        "gradient method, Comput. Optim. Appl. 93 (2026) 85-119, section 4, run anew "
        "in float64. rho is the gradient norm after pruning.",
        _setting(setting),
        _about(results),
        "## Claims",
        *(
            str(module.__doc__).partition("\n\n")[2].strip()
            for module in (checks, claims)
        ),
        _claims(results),
        *([EXPLAINED] if setting == "published" else []),
        f"What was tried where the article's figures do not come out, and what it "
        f"leaves open: [readings.md]({READINGS}).",
        *(
            _family(name, results, folder.name, list(drawn))
            for name, family in results.items()
            if family.problems
        ),
    ]
    page.write_text("\n\n".join(parts) + "\n")
