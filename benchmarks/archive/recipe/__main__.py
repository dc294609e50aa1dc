"""Runs the studies behind the recipes: `python -m benchmarks.archive.recipe all`.

LeNet-300-100 on the first 20,000 images of Fashion-MNIST, 12 epochs of minibatches of
128; accuracy on 5,000 other training images after one-shot magnitude pruning over all
kernels. The test images are not touched. Writes recipe.md and the folder recipe into
benchmarks/archive/results; what has been run with the same settings is not run again.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from benchmarks import datasets
from benchmarks.archive.recipe import families
from benchmarks.archive.recipe.studies import SHRINK, STUDIES, Plan, Study
from benchmarks.speed import environment
from benchmarks.systems import figures, records, training
from prunadag_optax import eval_params, masks

RESULTS = pathlib.Path(__file__).parents[1] / "results"
SPARSITIES = (0.0, 0.5, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
TRAINING, VALIDATION = 20_000, 5_000


def fashion() -> training.Data:
    """Training and validation images, both from the data set's training images."""
    images, labels = datasets.fashion_mnist()
    parts = [slice(TRAINING), slice(TRAINING, TRAINING + VALIDATION)]
    return training.Data(
        *(
            training.Examples(
                jnp.array(images[i].reshape(-1, 784)), jnp.array(labels[i], jnp.int32)
            )
            for i in parts
        )
    )


def curve(params: Any, data: training.Data) -> jax.Array:
    """Accuracy (%) after one-shot pruning to each of SPARSITIES."""
    return jnp.stack([_pruned(params, data, jnp.float32(s)) for s in SPARSITIES])


@jax.jit
def _pruned(params, data, sparsity):
    less, _ = masks.prune(params, sparsity)
    return training.accuracy(less, data.test)


def run(
    make: Any, data: training.Data, *, seeds: int, epochs: int, hidden: Any, batch: int
) -> np.ndarray:
    """The curves of a case, [seeds, sparsities]."""
    epoch = training.steps_of(data.train, batch, 1)
    tx = make(Plan(epoch * epochs, epoch))
    fit = training.trainer(
        lambda _: tx, batch=batch, measure=lambda params, state, data: {}
    )

    def one(key):
        initial, order = jax.random.split(key)
        start = training.init_network(
            initial, training.layers(data, hidden), training.KAIMING
        )
        fitted = fit(data, start, order, epochs=epochs)
        return curve(eval_params(fitted.state, fitted.params), data)

    return np.asarray(training.over_seeds(one, seeds))


def score(study: Study, curves: Any) -> np.ndarray:
    """What decides, for each seed."""
    places = [SPARSITIES.index(s) for s in study.sparsities]
    return np.asarray(curves)[:, places].mean(1)


def verdict(study: Study, found: dict[str, Any]) -> list[str]:
    """Each case against the first, by the differences seed by seed."""
    names = list(study.cases)
    first = score(study, found[names[0]]["curves"])
    lines = []
    for name in names[1:]:
        gain = score(study, found[name]["curves"]) - first
        error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.inf
        said = "no difference that the seeds can show"
        if abs(gain.mean()) > 2 * error:
            said = "better" if gain.mean() > 0 else "worse"
        lines.append(f"* {name}: {gain.mean():+.2f} ± {error:.2f} points, {said}.")
    return lines


def section(name: str, study: Study, found: dict[str, Any]) -> str:
    """Markdown of one study."""
    where = ", ".join(f"{s:.0%}" for s in study.sparsities)
    head = ["case", "decides", *(f"{s:.0%}" for s in SPARSITIES), "s"]
    rows = [head, ["---"] * len(head)]
    for case in study.cases:
        curves = np.asarray(found[case]["curves"])
        rows.append(
            [
                case,
                records.spread(score(study, curves).tolist(), 2),
                *(f"{v:.2f}" for v in curves.mean(0)),
                f"{found[case]['seconds']:.0f}",
            ]
        )
    return "\n\n".join(
        [
            f"## {study.title}",
            f"**Hypothesis.** {study.hypothesis}",
            f"**Experiment.** Validation accuracy (%) after pruning; {where} decides"
            f"{', in the mean' if len(study.sparsities) > 1 else ''}: mean ± standard "
            "deviation (range) over the seeds.",
            "\n".join("| " + " | ".join(row) + " |" for row in rows),
            f"![{study.title}](recipe/{name}.png)",
            f'**Verdict.** Against "{next(iter(study.cases))}", mean difference over '
            "the seeds ± its standard error; two of these are asked of a difference:",
            "\n".join(verdict(study, found)),
        ]
    )


def draw(axes: Any, study: Study, found: dict[str, Any]) -> None:
    """Accuracy against sparsity, whole and near the end."""
    curves = {
        name: {"x": [100 * s for s in SPARSITIES], "accuracy": found[name]["curves"]}
        for name in study.cases
    }
    for ax in axes:
        figures.curves(ax, curves, "accuracy", marker="o", markersize=3)
        ax.set_xlabel("weights pruned in one shot (%)")
        ax.set_ylabel("validation accuracy (%)")
    best = max(np.mean(found[name]["curves"], axis=0)[-2] for name in study.cases)
    axes[1].set_xlim(89.5, 99.2)
    axes[1].set_ylim(best - 8, None)


def write(folder: pathlib.Path) -> None:
    """Makes the page and the figures from the numbers that are there."""
    kept = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    about, known = kept["about"], kept["about"]["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
    parts = [*kept["studies"].values(), kept.get("family", {})]
    minutes = sum(case["seconds"] for part in parts for case in part.values())
    sections = [
        "# The recipe: what makes a prunAdag for minibatches",
        f"`{about['command']}`: {about['seeds']} seeds, {minutes / 60:.0f} minutes in "
        f"all on {known['backend']} ({known['architecture']}, {known['cores']} cores; "
        f"{versions}).",
        "LeNet-300-100 on the first 20,000 images of Fashion-MNIST, "
        f"{about['epochs']} epochs of minibatches of {about['batch']}, seeds side by "
        "side; accuracy on 5,000 other training images after one-shot magnitude "
        "pruning of all kernels together. Nothing here has seen the test images. "
        "`article` settings not named are v4, relevance by magnitude, the cubic "
        "schedule down to 2%, learning rate 0.05, d = 1/(k+1); of prunadag_w those of "
        "`recipes`, but for learning rates that fall along a half cosine where nothing "
        f"else is said, and d = {SHRINK:g} in `targeted` and in families. No l1 norm, "
        "and for any_sparsity the turns LEVELS, except in the studies of the l1 norm, "
        "which take the recipes as they are.",
    ]
    for name, study in STUDIES.items():
        found = kept["studies"].get(name, {})
        if set(found) >= set(study.cases):
            figures.write(draw, folder / "recipe" / f"{name}.png", study, found)
            sections.append(section(name, study, found))
    if families.ALONE in kept.get("family", {}):
        sections.append(families.section(kept["family"]))
    text = "\n\n".join(sections) + "\n"
    (folder / "recipe.md").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Runs what the command line asks for and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.archive.recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=[*STUDIES, "family", "all", "page"], nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="digits, two epochs")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {chosen.seeds}")
    names = [n for n in STUDIES if n in chosen.study or "all" in chosen.study]
    settings: dict[str, Any] = {"epochs": 12, "batch": 128, "hidden": training.LENET}
    if chosen.quick:
        settings = {"epochs": 2, "batch": 64, "hidden": (16,)}
    typed = " ".join(sys.argv[1:] if arguments is None else arguments)
    about = environment(f"python -m benchmarks.archive.recipe {typed}")
    about = {
        "command": about.pop("command"),
        "environment": about,
        "seeds": chosen.seeds,
        **{k: list(v) if k == "hidden" else v for k, v in settings.items()},
        "quick": chosen.quick,
    }
    file = chosen.output / "recipe.json"
    kept: dict[str, Any] = {"about": about, "studies": {}}
    if file.is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
        same = ("seeds", "epochs", "batch", "hidden", "quick")
        if chosen.study == ["page"] or all(
            old["about"][key] == about[key] for key in same
        ):
            kept = old
    training.wait_for_epochs()
    read = training.digits if chosen.quick else fashion
    families_too = bool({"family", "all"} & set(chosen.study))
    data: Any = read() if names or families_too else None

    def save():
        chosen.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    work = [(n, c) for n in names for c in STUDIES[n].cases]
    for name, case in (bar := tqdm(work, desc="recipe", disable=None)):
        found = kept["studies"].setdefault(name, {})
        if case in found:
            continue
        bar.set_postfix_str(case)
        began = time.perf_counter()
        curves = run(STUDIES[name].cases[case], data, seeds=chosen.seeds, **settings)
        seconds = time.perf_counter() - began
        found[case] = {"curves": curves.round(3).tolist(), "seconds": round(seconds, 1)}
        save()
    if families_too:
        known = kept.setdefault("family", {})
        for _ in families.run(data, known, seeds=chosen.seeds, **settings):
            save()
    write(chosen.output)
    print(chosen.output / "recipe.md")


if __name__ == "__main__":
    main()
