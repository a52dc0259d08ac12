"""The console shows how two models differ, how surely, and on which samples."""

from evaluation_files import write_evaluation

from isheep_jax.cli.comparison_lines import comparison_lines
from isheep_jax.evaluation.comparison import compare
from isheep_jax.evaluation.saved import find_evaluation


def lines_of(tmp_path, first, second, a=None, b=None, task="ifeval"):
    models = []
    for name, values, more in (("a", first, a), ("b", second, b)):
        scores = {f"s{n}": [{"prompt_strict": value}] for n, value in enumerate(values)}
        models.append(find_evaluation(write_evaluation(tmp_path / name, scores, task, title="IFEval", **(more or {}))))
    return comparison_lines("base", "tuned", *compare(*models))


def test_differences_come_with_interval_counts_and_p(tmp_path):
    lines = lines_of(tmp_path, [0] * 40, [1] * 10 + [0] * 30)
    assert lines[:5] == [
        "A: base",
        "B: tuned",
        "",
        "IFEval: 40 samples",
        "                      A       B   B - A     95 % interval  better   worse       p",
    ]
    cells = lines[5].split()
    assert cells[:4] == ["prompt_strict", "0.000", "0.250", "+0.250"]
    assert cells[5] == "to"
    assert cells[7:] == ["10", "0", "0.002"]


def test_changed_samples_are_shown_on_one_line_each(tmp_path):
    lines = lines_of(
        tmp_path,
        [1, 1, 0],
        [0, 1, 1],
        a={"prompts": {"s0": "Say\n it."}, "responses": {"s0": "It\n\nis."}},
        b={"prompts": {"s0": "Say\n it."}, "responses": {"s0": "long " * 100}},
    )
    start = lines.index("  1 sample got worse in prompt_strict:")
    assert lines[start + 1 : start + 5] == [
        "    s0  Say it.",
        "      A 1  It is.",
        f"      B 0  {('long ' * 100)[:157]}...",
        "  1 sample got better in prompt_strict:",
    ]


def test_long_responses_are_shown_from_where_they_differ(tmp_path):
    start = " ".join(["same"] * 100)
    lines = lines_of(
        tmp_path, [1], [0], a={"responses": {"s0": start}}, b={"responses": {"s0": f"{start} but {start}"}}
    )
    assert lines[-3] == f"      A 1  ...{start[-40:]}"
    assert lines[-2] == f"      B 0  ...{start[-40:]} but {start}"[:168] + "..."
    assert lines[-1] == "  0 samples got better in prompt_strict"


def test_long_prompts_keep_their_begin_and_their_question(tmp_path):
    prompts = {"prompts": {"s0": "Examples. " + "Q: x A: y " * 50 + "Q: why? A:"}}
    lines = lines_of(tmp_path, [1], [0], a=prompts, b=prompts)
    (line,) = [line for line in lines if line.startswith("    s0  ")]
    assert line.startswith("    s0  Examples. Q: x")
    assert " ... " in line
    assert line.endswith("Q: why? A:")
    assert len(line) <= 160 + 8


def test_only_the_first_changed_samples_are_shown(tmp_path):
    lines = lines_of(tmp_path, [0] * 9, [1] * 9)
    assert "  0 samples got worse in prompt_strict" in lines
    assert "  9 samples got better in prompt_strict, the first 3:" in lines
    assert sum(line.startswith("      A ") for line in lines) == 3


def test_only_the_first_scores_are_shown_and_the_main_one_leads(tmp_path):
    scores = {"s": [{**{f"score_{n}": 1 for n in range(10)}, "prompt_strict": 1}]}
    models = [find_evaluation(write_evaluation(tmp_path / name, scores, title="IFEval")) for name in "ab"]
    lines = comparison_lines("base", "tuned", *compare(*models))
    assert [line.split()[0] for line in lines[5:13]] == ["prompt_strict", *(f"score_{n}" for n in range(7))]
    assert lines[13] == "  3 more scores with --output"


def test_equal_models_say_so(tmp_path):
    lines = lines_of(tmp_path, [0, 1], [0, 1])
    assert lines[-1] == "  no sample changed in prompt_strict"
    assert "+0.000 to +0.000" in lines[-2]


def test_what_limits_the_comparison_is_told(tmp_path):
    lines = lines_of(tmp_path, [0, 1, 1], [0, 1], a={"settings": {"seed": 1}}, b={"settings": {"seed": 2}})
    assert lines[3] == "IFEval: 2 samples, 1 only in A"
    assert "  evaluated with different settings: seed 1 and 2" in lines


def test_points_have_two_digits_and_refused_tasks_a_line(tmp_path):
    for path, version in (("a", 1), ("b", 2)):
        write_evaluation(tmp_path / path, {"s": [{"rating": 1}]}, "squad", version=version)
    lines = lines_of(tmp_path, [6.5, 7], [7.5, 7], task="mt_bench")
    assert lines[5].split()[:4] == ["prompt_strict", "6.75", "7.25", "+0.50"]
    assert lines[-1].startswith("squad is not compared: ")
