"""The table of studies: the rows of each, the settings that a row changes, and the paper's number for it.

The paper's numbers are for Qwen1.5-72B on IFEval (prompt-level strict accuracy, %), one run each, from arXiv 2408.08072
v3. They are shown next to other models' accuracies to compare the direction only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isheep_jax.config import Config, flatten
from isheep_jax.config_checks import check_values
from isheep_jax.errors import UserError, did_you_mean
from isheep_jax.loop.judging.readings import TOGETHER
from isheep_jax.loop.selection.rules import check_readings, share_of
from isheep_jax.presets import apply_preset, replace_settings

# Settings by their command-line names, or a function that computes them from the config.
Changes = Mapping[str, object] | Callable[[Config], Mapping[str, object]]


@dataclass(frozen=True)
class Row:
    """One variant of the config.

    name: its name for --rows. title: its title in the table. changes: settings changed after `preset` is applied.
    paper: the paper's numbers by iteration. column: column of its first iteration, for a row whose one iteration has
    as many instructions as `column` iterations of the other rows.
    """

    name: str
    title: str
    changes: Changes = field(default_factory=dict)
    paper: Mapping[int, float] = field(default_factory=dict)
    column: int = 1
    preset: str = ""

    def settings(self, config: Config) -> Config:
        """Returns the config with this row's changes. Raises `UserError` when they do not fit it."""
        if self.preset:
            config = apply_preset(self.preset, config)
        changes = self.changes(config) if callable(self.changes) else self.changes
        changed = replace_settings(config, changes)
        check_values(changed)
        check_readings(changed)
        return changed

    def changed(self, config: Config) -> dict[str, object]:
        """Returns the settings that this row changes, with their new values."""
        before = flatten(config)
        return {name: value for name, value in flatten(self.settings(config)).items() if value != before[name]}


@dataclass(frozen=True)
class Study:
    """Rows that are compared with the first one.

    source: the paper's table, or why there are no numbers. measure: the compared figure, as a path into evaluation.json
    such as "tiny.content"; "" means the mean accuracy over the tasks. also_shown: further figures of each iteration by
    column title, as paths into summary.json. needs: settings without which the rows would not mean what they say.
    """

    title: str
    rows: tuple[Row, ...]
    source: str = "The paper has no numbers for this."
    measure: str = ""
    also_shown: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, object] = field(default_factory=dict)

    def check(self, config: Config) -> None:
        """Raises `UserError` for a config without the settings that the study needs."""
        for name, value in self.needs.items():
            if flatten(config)[name] != value:
                raise UserError(
                    f"--study: its rows need --{name}={value}, as in --config=tiny_domain or --preset=isara"
                )


def known_count(config: Config) -> int | None:
    """Returns how many pairs the config's rule keeps per iteration; None where only the run can tell."""
    share = share_of(config)
    if share is None:
        return None
    return min(int(share * config.synthesize.instructions + 0.5), config.select.max_pairs)


# What a filter by perplexity looks at, instead of the judge's scores.
_LIKELIHOOD = {"assess.readings": ("likelihood",), "select.ranking": "sum"}


def _random(config: Config) -> dict[str, object]:
    """Returns the settings of random selection of as many pairs as the config's rule keeps."""
    share = share_of(config)
    if share is not None:
        # A rule that ignores scores draws one of the responses, so that one response gives the same and costs less.
        return {"select.rule": "random", "select.fraction": share, "respond.samples": 1}
    # random_threshold keeps as many pairs as the threshold, whose number depends on the best of several responses.
    return {"select.rule": "random_threshold"}


def _perplexity(config: Config) -> dict[str, object]:
    """Returns the settings of the perplexity filter, with as many pairs as the config's rule keeps at most."""
    kept = known_count(config)
    return {"select.rule": "perplexity", **_LIKELIHOOD} | ({} if kept is None else {"select.max_pairs": max(1, kept)})


def _density(rule: str, **more: object) -> Callable[[Config], dict[str, object]]:
    """Returns changes: a density rule, with as many clusters as the config's rule keeps pairs."""

    def changes(config: Config) -> dict[str, object]:
        kept = known_count(config)
        return {"select.rule": rule, **more} | ({} if kept is None else {"select.clusters": max(1, kept)})

    return changes


def _times(rounds: int, fraction: float = 1.0, iterations: int | None = None) -> Callable[[Config], dict[str, object]]:
    """Returns changes: `rounds` times the instructions, and `fraction` times select.fraction."""

    def changes(config: Config) -> dict[str, object]:
        return {
            "iterations": iterations or config.iterations,
            "synthesize.instructions": rounds * config.synthesize.instructions,
            "select.fraction": fraction * config.select.fraction,
        }

    return changes


def _equal_counts(**assess: object) -> Callable[[Config], dict[str, object]]:
    """Returns changes: a way to read the judge's opinion, with a rule that keeps equally many pairs for all ways."""

    def changes(config: Config) -> dict[str, object]:
        reading = {f"assess.{name}": value for name, value in {"readings": ("rubric",), "samples": 1, **assess}.items()}
        # A row shows what a reading is worth, also where the check of the judge finds that it is a coin.
        check = {"guard.judge": "warn"} if "readings" in assess else {}
        return {"select.rule": "top_fraction", "select.ranking": "sum", "select.weights": (), **reading, **check}

    return changes


def _ranked_by(*readings: str) -> dict[str, object]:
    """Returns changes: the best pairs by some readings, also where the check of the judge finds that these are a coin.

    Responses are compared with others of their length, so that what is selected is not short or long answers.
    """
    return {
        "assess.readings": readings,
        "select.rule": "top_fraction",
        "select.ranking": "sum",
        "select.weights": (),
        "select.per": "token",
        "select.length_control": "buckets",
        "guard.judge": "warn",
    }


def _judge(name: str) -> dict[str, object]:
    """Returns changes: a judge, and a second one to measure the agreement with."""
    return {"assess.judge": name, "assess.agreement": 256}


# The paper's rule, independent of the config: one response, sampled scores, each above the threshold.
_PAPER_RULE = {
    "respond.samples": 1,
    "assess.readings": ("rubric",),
    "assess.read": "sampled",
    "select.rule": "threshold",
    "select.ranking": "sum",
    "select.buckets": "none",
    "select.following_ceiling": 10.0,
}
_NO_FILTER = {"select.rule": "none", "respond.samples": 1}
# Pairs are drawn or all kept: nothing is read, so that no judge needs to be checked.
_UNREAD = {"assess.readings": (), "select.weights": (), "guard.judge": "off"}
_COMBINED = {1: 35.67, 2: 37.34, 3: 41.22, 4: 42.14, 5: 44.55, 6: 42.33}
_THREE = {n: _COMBINED[n] for n in (1, 2, 3)}

STUDIES: dict[str, Study] = {
    "loop": Study(
        "The loop and its controls",
        (
            Row("loop", "the loop of the config"),
            Row("random", "random selection, as many pairs", _random),
            Row("unfiltered", "no filter, all pairs", _NO_FILTER),
            Row("once_fraction", "one round, 3 x the instructions, same fraction", _times(3, iterations=1), column=3),
            Row("once_pairs", "one round, 3 x the instructions, as many pairs", _times(3, 1 / 3, 1), column=3),
            Row(
                "reference",
                "the reference's rule: one response, sampled scores, both above 8",
                {**_PAPER_RULE, "select.threshold": 8.0},
            ),
        ),
    ),
    "iterative_settings": Study(
        "Iterative settings",
        (
            Row("one_base", "One_base: latest pairs, from the base", {}, _THREE),
            Row(
                "one_last",
                "One_last: latest pairs, from the latest model",
                {"sft.start": "previous"},
                {1: 35.67, 2: 38.45, 3: 38.63},
            ),
            Row(
                "total_base",
                "Total_base: all pairs so far, from the base",
                {"sft.data": "all"},
                {1: 35.67, 2: 39.00, 3: 37.52},
            ),
            Row(
                "total_last",
                "Total_last: all pairs so far, from the latest model",
                {"sft.data": "all", "sft.start": "previous"},
            ),
            Row("direct_2", "Direct: 2 x the instructions at once", _times(2, iterations=1), {2: 39.37}, column=2),
            Row("direct_3", "Direct: 3 x the instructions at once", _times(3, iterations=1), {3: 38.08}, column=3),
        ),
        "Table 2.",
    ),
    "self_assessment_level": Study(
        "Level of self-assessment",
        (
            Row("both", "quality and following", {"assess.level": "both"}, {1: 35.30, 2: 36.23, 3: 41.14}),
            Row("quality", "quality", {"assess.level": "quality"}, {1: 37.34, 2: 36.04, 3: 37.71}),
            Row("following", "following", {"assess.level": "following"}, {1: 35.49, 2: 40.48, 3: 39.93}),
            Row(
                "none",
                "none: all pairs",
                {"assess.readings": (), "respond.samples": 1},
                {1: 35.67, 2: 36.97, 3: 37.52},
            ),
        ),
        "Table 4 (simple prompt; its 41.14 is 42.14 in Table 3).",
    ),
    "assessment_prompt": Study(
        "Prompt of the assessment",
        (
            Row("standard", "standard: several aspects per criterion", {"assess.prompt": "standard"}, _THREE),
            Row("simple", "simple: one aspect each", {"assess.prompt": "simple"}, {1: 35.30, 2: 36.23, 3: 42.14}),
            Row("joint", "joint: one score for both", {"assess.prompt": "joint"}),
            Row(
                "few_shot",
                "few-shot: three scored examples, one score",
                {"assess.prompt": "few_shot"},
                {1: 38.82, 2: 37.34, 3: 41.22},
            ),
        ),
        "Tables 3 and 11 (combined, simple and ICL prompt).",
    ),
    "filters": Study(
        "Filters",
        (
            Row("self_assessment", "self-assessment", {}, _THREE),
            Row("random", "random, as many pairs", _random),
            Row("none", "no filter, all pairs", _NO_FILTER, {1: 33.64}),
            Row("perplexity", "perplexity", _perplexity, {1: 36.60, 2: 36.04, 3: 33.27}),
            Row("density", "density", _density("density"), {1: 34.20, 2: 37.34, 3: 37.52}),
            Row(
                "density_perplexity",
                "density and perplexity",
                _density("density_perplexity", **_LIKELIHOOD),
                {1: 37.52, 2: 40.48, 3: 38.82},
            ),
        ),
        "Tables 3 and 11; no filter: Table 1, Self-Instruct.",
    ),
    "threshold": Study(
        "Threshold of the paper's rule",
        tuple(
            Row(
                f"above_{c}".replace("-", "minus_"),
                f"both scores above {c}"
                + {-1: " (rules of responses off, too)", 0: " (no self-assessment)"}.get(c, ""),
                {**_PAPER_RULE, "select.threshold": float(c)},
            )
            for c in (8, 9, 6, 4, 2, 0, -1)
        ),
        "Figure 2a is a picture without numbers; its authors read a rise with the threshold at iteration 3.",
    ),
    "data_size": Study(
        "Instructions per iteration",
        tuple(Row(f"times_{k}", f"{k} x the instructions", _times(k)) for k in (1, 2, 3, 4, 5)),
        "Figure 2b (10,000 to 50,000) is a picture without numbers; all sizes rise over three iterations.",
    ),
    "judge": Study(
        "Judge",
        (
            Row("current", "the current model (the paper's text)", _judge("current")),
            Row("base", "the base model (the published code)", _judge("base")),
            Row("previous", "the model before the current one", _judge("previous")),
        ),
        also_shown={
            "agreement of the base model with it, or of the current one with the base": "agreement.correlation"
        },
    ),
    "score_reading": Study(
        "How the judge's opinion is read, at equal counts of kept pairs",
        (
            Row("expected", "expected: mean under the judge's distribution", _equal_counts(read="expected")),
            Row("sampled", "sampled once (the paper's)", _equal_counts(read="sampled")),
            Row("sampled_4", "mean of 4 samples", _equal_counts(read="sampled", samples=4)),
            Row("sampled_16", "mean of 16 samples", _equal_counts(read="sampled", samples=16)),
            Row("lift", "lift in place of scores", _equal_counts(readings=("lift",))),
            Row(
                "rubric_and_lift",
                "scores and lift, weighted 1 to 2",
                _equal_counts(readings=("rubric", "lift")),
            ),
        ),
        also_shown={"probability of the ten scores": "score_mass"},
    ),
    "real_model": Study(
        "What a reading selects on a real model",
        (
            Row("lift", "best by four readings, and their rules", _ranked_by(*TOGETHER)),
            Row("rubric", "best by the rubric", _ranked_by("rubric")),
            Row("random", "random, as many pairs", {"select.rule": "random", **_UNREAD}),
            Row("none", "no filter, all pairs", {"select.rule": "none", **_UNREAD}),
            Row(
                "ssd",
                "no filter, all of truncated samples (simple self-distillation)",
                {"select.rule": "none", "respond.temperature": (0.7,), "respond.top_p": 0.8, **_UNREAD},
            ),
            Row(
                "once",
                "best by four readings, one iteration with 3 x the instructions",
                lambda config: {**_ranked_by(*TOGETHER), **_times(3, iterations=1)(config)},
                column=3,
            ),
        ),
        "In the paper Qwen1.5-1.8B has 15.53 % of IFEval's prompts after iteration 1, then 16.27 % and 13.68 %.",
    ),
    "dromedary_vs_isheep": Study(
        "One iteration (what the paper calls Dromedary) and more",
        (
            Row("one", "I-SHEEP with one iteration, the paper's Dromedary", {"iterations": 1}, {1: 35.67}),
            Row("two", "I-SHEEP with two iterations", {"iterations": 2}, {n: _COMBINED[n] for n in (1, 2)}),
            Row("all", "I-SHEEP with all iterations of the config", {}, _COMBINED),
            Row(
                "no_filter",
                "one iteration without a filter (Self-Instruct)",
                {**_NO_FILTER, "iterations": 1},
                {1: 33.64},
            ),
            Row("self_align", "SELF-ALIGN: principles with thoughts, engraving, verbose cloning", preset="self_align"),
        ),
        "Table 1.",
    ),
    "isara_domain": Study(
        "A domain from few samples, ISARA-style",
        (
            Row("isara", "ISARA-style: nearest samples in the prompts"),
            Row("random", "samples drawn at random in the prompts", {"retrieval.choose": "random"}),
            Row(
                "kept",
                "nearest of the samples and of what earlier iterations wrote",
                {"retrieval.pool": "seeds_and_kept"},
            ),
            Row("zero_shot", "answers without samples in the prompt", {"respond.method": "zero_shot"}),
            Row("added", "trained on the samples, too", {"sft.seeds": "added"}),
            Row(
                "samples_alone",
                "trained on the samples alone",
                {"sft.seeds": "alone", "iterations": 1},
            ),
            Row(
                "samples_alone_20",
                "the same, 20 epochs",
                {"sft.seeds": "alone", "iterations": 1, "sft.epochs": 20},
            ),
            Row("direct_3", "3 x the questions at once", _times(3, iterations=1), column=3),
        ),
        "ISARA (arXiv 2401.06785) is another paper's.",
        needs={"synthesize.method": "retrieved"},
    ),
}


def named_study(name: str) -> Study:
    """Returns the study of this name. Raises `UserError` with the nearest name when there is none."""
    if name not in STUDIES:
        hint = did_you_mean(name, STUDIES)
        raise UserError(f"--study: there is no study '{name}'; {hint}known: {', '.join(STUDIES)}")
    return STUDIES[name]


def chosen_rows(study: Study, names: list[str] | None) -> tuple[Row, ...]:
    """Returns the rows of these names (None: all), in the study's order. Raises `UserError` for an unknown name."""
    known = [row.name for row in study.rows]
    for name in names or ():
        if name not in known:
            raise UserError(f"--rows: there is no row '{name}' in this study; known: {', '.join(known)}")
    return tuple(row for row in study.rows if names is None or row.name in names)
