"""What a terminal, a pipe, a program and a shell get of every command: text, JSON, nothing, completions, exit codes."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from kallos import main as command_line
from kallos.data.refresh import refresh_features
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.inference import server

PROGRAM = str(Path(sys.executable).with_name("kallos-run"))
HEAVY = {"torch", "darts", "numpy", "pandas", "pandera", "optuna", "sqlalchemy", "papermill", "plotly"}
FRAMES = re.compile("[\x1b\u2500-\u257f]")
COLOUR = re.compile("\x1b\\[(?:\\d+;)*(?:[349]\\d)m")
BTC = ("--asset-id", "BTC", "--timeframe", "1d")
BARS = "open_time,open,high,low,close,volume\n2023-01-01,1,2,1,2,5\n2023-01-02,2,3,1,1,6\n"


def commands(group: typer.core.TyperGroup, *above: str) -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every command of a group and of the groups in it, by the words that are typed."""
    for name, one in group.commands.items():
        yield from commands(one, *above, name) if hasattr(one, "commands") else [(" ".join([*above, name]), one)]


COMMANDS = dict(commands(typer.main.get_command(command_line.app)))
CODES = {
    "all": {4},
    "audit": {5},
    "backtest": {4},
    "cpcv": {4},
    "cv": {4},
    "doctor": {5},
    "drift": {4, 5},
    "ensemble": {4},
    "evaluate": {4},
    "fetch": {4},
    "predict": {4, 5},
    "preflight": {5},
    "reproduce": {4, 5},
    "train": {4},
    "tune": {4},
    "walk-forward": {4},
}


# Help


@pytest.mark.parametrize("words", COMMANDS)
def test_the_help_of_a_command_has_an_example_its_exit_codes_and_both_voices(words):
    help_, flags = COMMANDS[words].help, {flag for one in COMMANDS[words].params for flag in one.opts}
    assert {"--json", "--quiet"} <= flags
    assert f"Example: kallos-run {words} --" in help_ or f"Example: kallos-run {words} " in help_
    [told] = [line for line in help_.split("\n\n") if line.startswith("Exit codes: ")]
    without = re.sub(r"\([^)]*\)", "", told).removeprefix("Exit codes: ").removesuffix(".")  # how to go on after 3
    assert {int(one.split()[0]) for one in without.split("; ")} == {0, 2, 3} | CODES.get(words, set())


WALK = """import time
began = time.process_time()  # the processor's time: a busy machine is no fault of ours
import contextlib, io, sys
import kallos
alone = time.process_time() - began
from kallos import main as command_line
program, helps = time.process_time() - began, []
for words in WORDS:
    sys.argv, said, began = ["kallos-run", *words.split(), "--help"], io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stdout(said):
            command_line.main()
    except SystemExit as left:
        assert left.code == 0, words
    helps.append(time.process_time() - began)
    assert f"Example: kallos-run {words} " in " ".join(said.getvalue().split()) or not words, words
    assert not set(said.getvalue()) & set(map(chr, [27, *range(0x2500, 0x2580)])), words
print(alone, program + max(helps), *{name.split(".")[0] for name in sys.modules})"""


def test_every_help_answers_in_half_a_second_and_loads_nothing_heavy(tmp_path):
    code = WALK.replace("WORDS", repr(["", *COMMANDS]))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    alone, program, *loaded = run.stdout.split()
    assert HEAVY & {*loaded} == set()
    assert float(alone) < 0.05 and float(program) < 0.5  # seconds


def on_a_terminal(*words: str, **environment: str) -> str:
    """What a terminal of 100 columns shows of a command."""
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm-256color"} | environment
    with os.fdopen(leader, "rb", buffering=0) as screen:
        how = {"stdin": follower, "stdout": follower, "stderr": follower}
        program, shown = subprocess.Popen([PROGRAM, *words], env=environment, **how), b""
        os.close(follower)
        with suppress(OSError):  # the program has gone, and its terminal with it
            while chunk := screen.read(65536):
                shown += chunk
        assert program.wait(60) == 0
    return shown.decode()


def test_a_terminal_gets_frames_and_colours_unless_there_shall_be_none(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "CI"):
        monkeypatch.delenv(name, raising=False)
    for words in (("--help",), ("doctor", "--help")):
        coloured, plain = on_a_terminal(*words), on_a_terminal(*words, NO_COLOR="1")
        assert "╭" in coloured and "╭" in plain
        assert COLOUR.search(coloured) and not COLOUR.search(plain)


# Text, JSON, nothing


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a database that holds BTC with features and ETH without, a file of bars, and two runs."""
    folder = tmp_path_factory.mktemp("terminal")
    for run, status in (("20240501", "done"), ("20240502", "failed")):
        (folder / "reports" / run).mkdir(parents=True)
        about = {"run_id": run, "status": status, "started_at": "2024-05-01T10:00:00Z", "seconds": 81.0}
        (folder / "reports" / run / "summary.json").write_text(json.dumps(about | {"parts": {}}))
    (folder / "bars.csv").write_text(BARS)
    engine = connect(f"sqlite:///{folder}/data/kallos.db")
    for asset, start in (("BTC", "2023-01-01"), ("ETH", "2025-12-01")):
        write_bars(engine, sample_bars(start=start), asset_id=asset, timeframe="1d", venue="sample", market="spot")
    refresh_features(engine, asset_id="BTC", timeframe="1d")
    engine.dispose()
    return folder


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "KALLOS_DB_URL"}


@pytest.fixture
def typed(typed, place, monkeypatch):
    """A command line in the place."""
    monkeypatch.chdir(place)
    return typed


# what is typed, and what the JSON has and text says of the same thing
FOUND = {
    "sample": ((*BTC, "--start", "2023-01-01"), "asset_id", "the sample market (seed 0)"),
    "ingest": (("bars.csv", "--asset-id", "XRP", "--timeframe", "1d"), "series", "XRP 1d: 2 bars"),
    "features": (BTC, "series", "all known already"),
    "data": ((*BTC, "--horizons", "1", "--output-path", "tables"), "parts", "rows purged or embargoed"),
    "config": ((), "properties", "Settings of a run"),
    "config --config": (("--config", "mine.yaml"), "assets", "assets:"),
    "runs list": (("--reports", "reports"), 0, "2 runs in"),
    "runs prune": (("--failed", "--reports", "reports"), "runs", "Nothing was removed"),
}


@pytest.mark.parametrize("command", FOUND)
def test_an_answer_is_text_or_json_or_nothing(command, typed, place):
    more, key, words = FOUND[command]
    (place / "mine.yaml").write_text("assets: [BTC]\n")
    command = [word for word in command.split() if word != "--config"]
    code, said, _ = typed(*command, *more)
    assert code == 0 and words in said and not FRAMES.search(said)
    code, said, told = typed(*command, *more, "--json")
    found = json.loads(said)
    assert code == 0 and (found[key] is not None) and words not in told
    if command != ["data"]:  # which takes seconds
        assert typed(*command, *more, "--json", "--quiet")[::2] == (0, "")
        assert typed(*command, *more, "--quiet") == (0, "", "")


def test_an_error_is_text_whatever_was_asked_for(typed):
    for voice in ((), ("--json",), ("--quiet",), ("--json", "--quiet")):
        code, said, told = typed("sample", *BTC, "--signal", "2", *voice)
        assert (code, said, told.count("\n")) == (2, "", 1) and "signal must lie between" in told


def test_a_service_tells_where_it_listens_and_a_key_is_never_lost(typed, monkeypatch, place):
    monkeypatch.setattr(server, "serve", lambda settings, tell: tell("http://127.0.0.1:8080"))
    assert typed("serve", "--bundles", ".", "--json") == (0, '{"url": "http://127.0.0.1:8080"}\n', "")
    assert typed("serve", "--bundles", ".")[:2] == (0, "http://127.0.0.1:8080\n")
    assert typed("serve", "--bundles", ".", "--quiet") == (0, "", "")
    made = typed("serve", "--keys", "keys.json", "--new-key", "trader", "--quiet")
    assert made[1].startswith("kallos_") and made[2] == ""
    assert json.loads(typed("serve", "--keys", "keys.json", "--new-key", "other", "--json")[1])["name"] == "other"


CHATTER = """import os, sys
from kallos.answers import Answer, speaking, tell
with speaking(as_json=True, quiet={quiet}):
    os.system("echo a child; echo its error >&2")
    print("a library")
    print("a warning", file=sys.stderr)
    tell(Answer(dict(rows=3), "3 rows"))
print("afterwards")
print("an error", file=sys.stderr)"""


@pytest.mark.parametrize("quiet", [False, True])
def test_what_children_and_libraries_print_is_no_part_of_the_json(quiet):
    command = [sys.executable, "-c", CHATTER.format(quiet=quiet)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == '{"rows": 3}\nafterwards\n'
    chatter = ["a child", "a library", "a warning", "its error"]
    assert sorted(run.stderr.splitlines()) == sorted(["an error", *([] if quiet else chatter)])


# The commands that fit something, one after the other


@pytest.mark.slow
def test_what_is_made_of_a_market_is_told_in_json_from_study_to_forecast(typed, place):
    run = (*BTC, "--end-date", "2024-06-30", "--output-path", "made", "--no-report")
    tuned = json.loads(typed("tune", "--model-name", "linear", *run, "--n-trials", 1, "--folds", 2, "--json")[1])
    assert tuned["n_trials"] == 1 and tuned["metrics"]["folds"] == 2 and "made/optuna.db" in tuned["files"]
    named = ("--params-file", tuned["params_file"])
    code, said, told = typed("train", *run, *named, "--quiet")
    assert (code, said, told) == (0, "", "") and (place / "made/linear_BTC_manifest.json").exists()
    judged = json.loads(typed("cv", *run[:-1], *named, "--n-splits", 2, "--json")[1])
    assert (judged["folds"], judged["chosen_on_these_rows"]) == (2, True) and judged["sentence"]
    packed = json.loads(typed("bundle", "--manifest", "made/linear_BTC_manifest.json", "--json")[1])
    assert packed["proof"]["windows"] > 0
    opened = json.loads(typed("verify", "--bundle", packed["path"], "--json")[1])
    assert (opened["id"], opened["digest"]) == (packed["id"], packed["digest"])
    asked = json.loads(typed("predict", "--bundle", packed["path"], "--json")[1])
    assert asked["bundles"][0]["forecasts"] > 0 and asked["faults"] == {}
    code, said, told = typed("predict", "--bundle", packed["path"], "--bundle", "none", "--json")
    assert code == 4 and [*json.loads(said)["faults"]] == ["none"] and "none: " in told


# Completion, as the shells ask for it

COMPLETED = {
    "tu": ["tune"],
    "runs ": ["compare", "list", "prune"],
    "tune --n-t": ["--n-trials"],
    "data --js": ["--json"],
    "tune --pruner me": ["median"],
    "features --asset-id B": ["BTC"],
    "audit --asset-id E": ["ETH"],
    "runs compare 2024050": ["20240502", "20240501"],
}
ASK = """import atexit, sys
atexit.register(lambda: print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr))
from kallos.main import main
main()"""


def ask(shell: str, place: Path, line: str) -> subprocess.CompletedProcess:
    """What the shell is answered about a line that was typed up to its end."""
    words = line.split(" ")
    asked = {"_KALLOS_RUN_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    asked |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-c", ASK]
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=_clean() | asked, check=True)


@pytest.mark.parametrize("line", COMPLETED)
def test_a_word_is_completed_without_a_heavy_import(line, place):
    run = ask("bash", place, f"kallos-run {line}")
    assert sorted(run.stdout.split()) == sorted(COMPLETED[line])
    assert HEAVY & {*run.stderr.split()} == set()


def test_zsh_and_fish_are_answered_in_their_own_form(place):
    assert '"tune":"Search a model' in ask("zsh", place, "kallos-run tu").stdout
    assert ask("fish", place, "kallos-run tu").stdout.startswith("tune\tSearch a model")


def test_bash_completes_once_it_was_installed(tmp_path, place):
    home = _clean() | {"HOME": str(tmp_path), "PATH": f"{Path(PROGRAM).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", "kallos-run --install-completion; true"], env=home, cwd=place, check=True)
    assert str(tmp_path / ".bash_completions/kallos-run.sh") in (tmp_path / ".bashrc").read_text()
    code = """source ~/.bashrc
    COMP_WORDS=(kallos-run tune --sampler r) COMP_CWORD=3
    _kallos_run_completion kallos-run
    echo "${COMPREPLY[@]}"
    """
    run = subprocess.run(["bash", "-c", code], env=home, cwd=place, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["random"], run.stderr
