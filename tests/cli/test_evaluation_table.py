"""Tables of evaluated models say what was measured, how surely, and on how much of the task."""

from isheep_jax.cli.evaluation_table import evaluation_lines, task_lines, warning_lines
from isheep_jax.evaluation.reference import reference_rows

FIGURES = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")


def result(value=0.25, task="IFEval", names=FIGURES, count=541, of=541, unfinished=0.0, unanswered=0):
    return {
        "title": task, "main": names[0], "count": count, "of": of, "unfinished": unfinished, "unanswered": unanswered,
        "figures": {name: {"value": value + n / 10, "stderr": 0.0123, "count": 541} for n, name in enumerate(names)},
    }  # fmt: skip


def test_table_of_one_task_shows_its_figures_with_standard_errors():
    assert evaluation_lines([("iteration 0 (base)", {"ifeval": result()}), ("1", {"ifeval": result(0.5)})]) == [
        "IFEval (541 samples): value ± standard error",
        "                      prompt_strict  instruction_strict   prompt_loose  instruction_loose",
        "  iteration 0 (base)  0.250 ± 0.012       0.350 ± 0.012  0.450 ± 0.012      0.550 ± 0.012",
        "  1                   0.500 ± 0.012       0.600 ± 0.012  0.700 ± 0.012      0.800 ± 0.012",
    ]


def test_several_tasks_are_summed_up_first():
    models = [
        ("base", {"ifeval": result()}),
        ("tuned", {"ifeval": result(), "other": result(6.5, "MT-Bench", ("rating",))}),
    ]
    lines = evaluation_lines(models)
    assert lines[:4] == [
        "value ± standard error         ifeval        other",
        "base                    0.250 ± 0.012",
        "tuned                   0.250 ± 0.012  6.50 ± 0.01",
        "",
    ]
    assert [line for line in lines if line and line[0] != " "][3:] == [
        "IFEval (541 samples): value ± standard error",
        "MT-Bench (541 samples): value ± standard error",
    ]


def test_a_limit_is_told_beside_the_figures():
    assert task_lines("ifeval", [("base", result(count=60))])[0] == "IFEval (60 of 541 samples): value ± standard error"
    lines = task_lines("ifeval", [("base", result(count=60)), ("tuned", result())])
    assert lines[0] == "IFEval: value ± standard error"
    assert lines[2].startswith("  base (60 of 541 samples)  0.250")
    assert lines[3].startswith("  tuned (541 samples)       0.250")
    several = {"ifeval": result(count=60), "tiny": result()}
    assert evaluation_lines([("base", several)])[0].split()[-3:] == ["ifeval", "(60/541)", "tiny"]


def test_published_figures_are_marked_as_those_of_another_harness():
    lines = evaluation_lines([("iteration 1", {"ifeval": result()})], "Qwen1.5-7B")
    assert lines[3].split() == ["I-SHEEP", "iteration", "1", "[1]", "0.285", "0.399", "0.310", "0.434"]
    assert lines[6].split() == ["Qwen1.5-7B-Chat", "[2]", "0.388"]
    assert lines[7:] == [
        "  [1] another harness's: I-SHEEP, arXiv 2408.08072v3, table 1 (harness and decoding not stated)",
        "  [2] another harness's: OpenCompass (the official chat model)",
    ]
    assert max(map(len, lines)) <= 100


def test_a_published_mean_is_compared_with_the_models_own_mean():
    lines = evaluation_lines([("base", {"ifeval": result()})], "SmolLM2-360M")
    assert [line.split() for line in lines[3:7]] == [
        ["mean", "of", "prompt_strict", "and", "instruction_strict"],
        ["base", "0.300"],
        ["SmolLM2-360M-Instruct", "[1]", "0.410"],
        ["SmolLM2-360M-Instruct", "[2]", "0.083"],
    ]


def test_published_figures_from_several_tables_share_a_row():
    models = [("iteration 1", result(6.0, "MT-Bench", ("rating", "turn_1", "turn_2")))]
    lines = task_lines("unknown", models, reference_rows("Qwen1.5-72B", "mt_bench"))
    assert [line.split()[-3:] for line in lines if line.startswith("  I-SHEEP iteration 1 ")] == [
        ["6.43", "7.76", "5.11"]
    ]
    assert lines[-1].startswith("  [1] another harness's: I-SHEEP, arXiv 2408.08072v3, table 1 and 12 (")


def test_published_figures_that_the_models_lack_are_left_out():
    lines = task_lines("ifeval", [("base", result(names=("other",)))], reference_rows("Qwen1.5-7B", "ifeval"))
    assert len(lines) == 3


def test_four_tasks_fit_the_width_of_a_terminal():
    names = ("ifeval", "humaneval_plus", "triviaqa", "mbpp")
    models = [(f"iteration {n}", {name: result(task=name) for name in names}) for n in range(4)]
    assert max(map(len, evaluation_lines(models, "Qwen1.5-72B"))) <= 100


def test_cut_off_and_missing_responses_are_warned_about():
    good, bad = {"ifeval": result(unfinished=0.05)}, {"ifeval": result(unfinished=0.21, unanswered=3)}
    assert warning_lines([("base", good)]) == []
    lines = evaluation_lines([("base", good), ("one", bad), ("two", bad)])
    assert lines[-3:] == [
        "",
        "ifeval: many responses were cut off by the limit of new tokens (21% of one, 21% of two)",
        "ifeval: responses that do not fit into the context count as wrong (3 of one, 3 of two)",
    ]


def test_a_task_that_was_not_judged_says_so():
    unjudged = {**result(task="MT-Bench"), "figures": {}}
    assert task_lines("mt_bench", [("base", unjudged)]) == [
        "MT-Bench: no figures, because the responses are not judged"
    ]
