"""The console: plain lines and bars, rates, rows, warnings, and answers before and after."""

import io
import json
from dataclasses import replace

import pytest

from isheep_jax.cli.console import Console
from isheep_jax.cli.progress import StageProgress, duration
from isheep_jax.cli.results import before_and_after, row_cells, row_warnings
from isheep_jax.loop.summary import IterationSummary
from isheep_jax.named_configs import named_config

ROW = IterationSummary(
    iteration=1,
    instructions=512,
    kept=150,
    mean_quality=6.25,
    mean_following=7.5,
    train_loss=0.4321,
    evaluation={"tiny": {"accuracy": 0.58, "stderr": 0.01}},
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def screen():
    return io.StringIO()


def test_without_terminal_stage_prints_its_start_its_end_and_line_every_ten_seconds(tmp_path, screen, clock):
    with (
        Console(tmp_path / "run", stream=screen, clock=clock) as console,
        console.stage(1, "respond", 100, "answers") as stage,
    ):
        for _ in range(25):
            clock.now += 1
            stage.advance(4, dropped=3)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "iteration 1 · respond: 100 answers"
    assert lines[1] == "iteration 1 · respond: 40/100 answers, 4/s, 15 s left (dropped 3)"
    assert lines[-1] == "iteration 1 · respond: 100 answers in 25 s (dropped 3)"
    assert len(lines) == 4


def test_stage_whose_work_tells_total_starts_when_it_does(tmp_path, screen, clock):
    with (
        Console(tmp_path, stream=screen, clock=clock) as console,
        console.stage(1, "fine-tune", None, "updates") as stage,
    ):
        clock.now += 5
        assert screen.getvalue() == ""
        stage.update(1, 34, loss=0.5)
        stage.update(34, 34, loss=0.25)
    assert screen.getvalue().splitlines() == [
        "iteration 1 · fine-tune: 34 updates",
        "iteration 1 · fine-tune: 34 updates in 5.0 s (loss 0.25)",
    ]


def test_stage_that_fails_does_not_print_that_it_ended(tmp_path, screen, clock):
    console = Console(tmp_path, stream=screen, clock=clock)
    with pytest.raises(RuntimeError), console.stage(1, "respond", 100, "answers"):
        raise RuntimeError
    assert screen.getvalue().splitlines() == ["iteration 1 · respond: 100 answers"]


def test_on_terminal_stage_shows_bar_with_rate_and_time_left(tmp_path, screen, clock):
    console = Console(tmp_path, stream=screen, interactive=True, clock=clock)
    with console, console.stage(1, "respond", 100, "answers") as stage:
        stage.advance(10)
        clock.now += 10
        stage.advance(20)
    assert "30/100 answers, 2/s, 35 s left" in screen.getvalue()


def test_units_done_by_earlier_process_do_not_count_in_rate(clock):
    stage = StageProgress(100, "answers", clock)
    stage.advance(90)
    assert stage.rate == 0
    clock.now += 10
    stage.advance(5)
    assert stage.rate == 0.5
    assert stage.line() == "95/100 answers, 0.5/s, 10 s left"


def test_nothing_is_written_before_loop_accepts_directory(tmp_path, screen):
    directory = tmp_path / "run"
    with Console(directory, stream=screen) as console:
        console.note("first line")
        assert not directory.exists()
        with console.stage(1, "respond", 1, "answers"):
            pass
    assert (directory / "log.txt").read_text().splitlines()[0] == "first line"


def test_resumed_run_goes_on_with_same_log(tmp_path, screen):
    for _ in range(2):
        with Console(tmp_path, stream=screen) as console:
            console.row(ROW)
            console.closing([ROW])
    assert (tmp_path / "log.txt").read_text() == screen.getvalue()


def test_row_shows_accuracy_with_its_95_percent_interval():
    cells = row_cells(ROW)
    assert list(cells.values()) == ["1", "512", "150", "6.25", "7.50", "0.432", "0.580 ± 0.020"]


def test_base_models_row_has_only_what_was_measured():
    cells = row_cells(IterationSummary(0, evaluation={"tiny": {"accuracy": 0.1, "stderr": 0.01}}))
    assert list(cells.values()) == ["0 (base)", "-", "-", "-", "-", "-", "0.100 ± 0.020"]


def test_much_shorter_answers_are_warned_of():
    first = replace(ROW, kept_characters=300.0)
    assert row_warnings([first]) == []
    assert row_warnings([first, replace(ROW, iteration=2, kept_characters=250.0)]) == []
    (warning,) = row_warnings([first, replace(ROW, iteration=2, kept_characters=150.0)])
    assert "iteration 2" in warning
    assert "150 characters" in warning


def test_responses_that_do_not_come_to_an_end_are_warned_of():
    assert row_warnings([replace(ROW, ended=0.9)]) == []
    (warning,) = row_warnings([ROW, replace(ROW, iteration=2, ended=0.25)])
    assert "iteration 2: only 25% of the responses came to an end before respond.max_tokens" in warning


def write_examples(directory, iteration, answers):
    path = directory / f"iteration_{iteration}" / "evaluation.json"
    path.parent.mkdir(parents=True)
    examples = [
        {"instruction": f"Do {k}.", "response": a, "correct": a.startswith("good")} for k, a in enumerate(answers)
    ]
    path.write_text(json.dumps({"tiny": {"accuracy": 0.5, "examples": examples}}))


def test_before_and_after_show_same_instructions_spread_over_held_out_set(tmp_path):
    write_examples(tmp_path, 0, ["bad\nanswer"] * 9)
    write_examples(tmp_path, 2, [f"good {k}" for k in range(9)])
    lines = before_and_after(tmp_path, [ROW, replace(ROW, iteration=2)])
    assert [line.strip() for line in lines if line.startswith("  Do")] == ["Do 0.", "Do 3.", "Do 6."]
    assert "    before (wrong)  bad / answer" in lines
    assert "    after  (right)  good 3" in lines


def test_closing_names_run_directory_and_next_command(tmp_path, screen):
    with Console(tmp_path, stream=screen) as console:
        console.row(ROW)
        console.closing([ROW])
    assert "0.580 ± 0.020" in screen.getvalue()
    assert f"python -m isheep_jax.generate --model {tmp_path} --prompt" in screen.getvalue()


def test_table_grows_after_each_iteration_that_worked(tmp_path, screen):
    with Console(tmp_path, stream=screen) as console:
        for number in (1, 2):
            with console.stage(number, "respond", 1, "answers"):
                pass
            console.row(replace(ROW, iteration=number))
        console.closing([])
    assert [line.split()[0] for line in screen.getvalue().splitlines() if "0.580" in line] == ["1", "1", "2"]


def test_finished_iterations_of_resumed_run_come_in_one_table(tmp_path, screen):
    with Console(tmp_path, stream=screen) as console:
        console.row(ROW)
        console.row(replace(ROW, iteration=2))
        console.closing([])
    assert [line.split()[0] for line in screen.getvalue().splitlines() if "0.580" in line] == ["1", "2"]


def test_opening_says_what_will_happen(tmp_path, screen):
    config = named_config("tiny")
    console = Console(tmp_path, stream=screen)
    console.opening(config, "Llama, 2.3 M parameters, on 1 CPU device")
    assert screen.getvalue() == ""  # the run may still be refused
    console.note("a stage begins")
    text, after = screen.getvalue().split("a stage begins")
    assert after == "\n"
    for word in ("2.3 M parameters", str(config.iterations), str(config.synthesize.instructions), "runs/tiny"):
        assert word in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.23, "1.2 s"), (42.4, "42 s"), (200, "3 min 20 s"), (3900, "1 h 5 min"), (float("inf"), "?")],
)
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text
