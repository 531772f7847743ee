"""`celora chat`, `generate` and `export` as commands: what they read, what they print, how they end."""

from __future__ import annotations

import io
import json
import re
import signal

import pytest

from asked import error_line
from celora.cli.main import main
from celora.cli.use import _turns
from celora.errors import CELoraError
from patching import patch_all

SHORT = ["--max-new-tokens", "4", "--temperature", "0"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_one_prompt_has_one_answer(finished, capsys):
    assert run("chat", finished[0], "--prompt", "w1 w2", *SHORT) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert said.err == ""
    assert run("chat", finished[0], "--prompt", "w1 w2", "--json", "--base", *SHORT) == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row) == ["prompt", "generated", "generated_by_base"]
    assert row["generated"] == said.out.strip()
    assert run("chat", finished[0], "--prompt", "w1 w2", "--base", *SHORT) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"adapter: {row['generated']}", f"base: {row['generated_by_base']}"]


def test_lines_of_stdin_are_turns(finished, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n\nw5\n/reset\nw1 w2\n"))
    assert run("chat", finished[0], "--json", *SHORT) == 0
    answered = capsys.readouterr().out
    first, second, anew = (json.loads(line) for line in answered.splitlines())
    assert second["prompt"] == "w5"
    assert anew == first
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("\ufeffw1 w2\r\nw5\r\n/reset\r\nw1 w2\r\n", newline="\n")
    )  # of Windows
    assert run("chat", finished[0], "--json", *SHORT) == 0
    assert capsys.readouterr().out == answered


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal. A shell makes jobs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_answer_and_not_the_program(finished, capsys, monkeypatch):
    typed = iter(["w1", KeyboardInterrupt, "w2", "w3 " * 200, EOFError])

    def read(mark):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    def ask(talk, prompt, say=lambda text: None):
        if prompt == "w1":
            say("half")
            signal.raise_signal(signal.SIGINT)
        return real(talk, prompt, say)

    from celora.train.use.generation import Conversation

    real = Conversation.ask
    monkeypatch.setattr(Conversation, "ask", ask)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert run("chat", finished[0], *SHORT) == 0
    said = capsys.readouterr()
    half, answer = said.out.split("\n")[:2]
    assert half == "half"
    assert answer
    notes = said.err.splitlines()
    assert notes[0].endswith("Ctrl-C ends an answer, Ctrl-D the conversation.")
    assert "(Ctrl-D ends the conversation)" in notes
    assert re.fullmatch(r"error: \d+ tokens, and the model's context holds 128; .*", notes[-1])


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("fails", [KeyboardInterrupt, CELoraError("too long")])
def test_both_conversations_have_the_same_turns(fails, finished, capsys, monkeypatch):
    from celora.train.use.generation import Conversation

    typed, talks = iter(["w1", "w2"]), {}

    def read(mark):
        if line := next(typed, None):
            return line
        raise EOFError

    def ask(talk, prompt, say=lambda text: None):
        talks[talk.base] = talk
        if fails is KeyboardInterrupt and prompt == "w1" and not talk.base:
            talk.turns = [*talk.turns, prompt]
            signal.raise_signal(signal.SIGINT)
        if fails is not KeyboardInterrupt and prompt == "w1" and talk.base:
            raise fails
        talk.turns = [*talk.turns, prompt]

    monkeypatch.setattr(Conversation, "ask", ask)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert run("chat", finished[0], "--base", *SHORT) == 0
    assert talks[False].turns == talks[True].turns == (["w1", "w2"] if fails is KeyboardInterrupt else ["w2"])


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_a_script_is_130(finished, capsys, monkeypatch):
    from celora.train.use.generation import Conversation

    def ask(talk, prompt, say=lambda text: None):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Conversation, "ask", ask)
    assert run("chat", finished[0], "--prompt", "w1") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_file_of_prompts_is_answered(finished, inputs, capsys, tmp_path):
    output = tmp_path / "answers.jsonl"
    command = ["generate", finished[0], "--data", inputs["data"], "--limit", 5, "--batch-size", 2, *SHORT]
    assert run(*command, "--output", output) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-2:] == ["5 of 5 rows answered", f"Saved as {output}"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"messages", "generated"}] * 5
    assert "exists; --overwrite replaces it" in error_line(capsys, *command, "--output", output)
    output.write_text("".join(f"{line}\n" for line in output.read_text().splitlines()[:2]))
    assert run(*command, "--output", output, "--resume", "-q") == 0
    assert capsys.readouterr().err == ""
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    assert run(*command, "-q") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_rows_of_text_are_asked_by_the_column_of_the_run(inputs, capsys, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(json.dumps({"body": "w1 w2 w3", "id": 7}) + "\n")
    own = ["--model", inputs["model"], "--data", rows, "--dataset_text_field", "body"]
    assert run("train", *own, "--output", out, "--max_steps", "1", "--preset", "exact", "-q") == 0
    capsys.readouterr()
    assert run("generate", out, "--data", rows, "-q", *SHORT) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["body"], row["id"]) == ("w1 w2 w3", 7)
    assert "generated" in row


def test_files_below_the_home_are_found(finished, inputs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "w1"}')
    assert run("generate", finished[0], "--data=~/asked.jsonl", "--output=~/answers.jsonl", *SHORT) == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["prompt"] == "w1"


def test_ctrl_c_names_the_command_that_goes_on(finished, inputs, capsys, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    patch_all(monkeypatch, "celora.train.use.generation:answers", interrupted)
    command = ["generate", finished[0], "--data", inputs["data"], "--output", tmp_path / "answers.jsonl"]
    assert run(*command) == 130
    assert "To continue, give the same command with --resume." in capsys.readouterr().err


def test_what_ends_the_command_from_outside_leaves_the_answers(finished, inputs, capsys, monkeypatch, tmp_path):
    from celora.train.use import prompts
    from celora.train.use.generation import answers

    def ended(trained, prompts, sampling, **more):
        if told:
            signal.raise_signal(signal.SIGTERM)
        told.append(1)
        return answers(trained, prompts, sampling, **more)

    output, told = tmp_path / "answers.jsonl", []

    def save(path, rows):
        signal.raise_signal(signal.SIGTERM)  # as a system that repeats it
        written(path, rows)

    patch_all(monkeypatch, "celora.train.use.generation:answers", ended)
    written = prompts._save
    monkeypatch.setattr(prompts, "_save", save)
    before = signal.getsignal(signal.SIGTERM)
    assert run("generate", finished[0], "--data", inputs["data"], "--batch-size", 3, "--output", output, *SHORT) == 130
    assert "To continue, give the same command with --resume." in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_lines_of_a_pipe_are_answered_without_a_stdout_to_ask_on(monkeypatch):
    """`input` would refuse to read where stdout is closed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n\nw2"))
    monkeypatch.setattr("sys.stdout", None)
    assert [*_turns(interactive=False)] == ["w1", "w2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "nowhere"], "'nowhere': no such folder"),
        (["chat"], "Missing argument 'OUT'"),
        (["chat", "OUT", "--prompt", "w1", "--temperature", "-1"], "--temperature"),
        (["chat", "OUT", "--prompt", "w1", "--model", "./gone"], "'./gone': no such folder"),
        (["export", "OUT"], "Missing option '--to'"),
        (["export", "OUT", "--to", "onnx"], "'onnx' is not one of 'gguf', 'safetensors', 'mlx'"),
        (["generate", "OUT"], "Missing option '--data'"),
        (["generate", "OUT", "--data", "gone.jsonl"], "no such data file or folder: 'gone.jsonl'"),
        (["generate", "OUT", "--data", "DATA", "--resume"], "--resume continues the file in --output"),
        (["generate", "OUT", "--data", "DATA", "--output", "gone/answers.jsonl"], "expected a file in a folder"),
    ],
)
def test_mistakes_are_one_line(arguments, said, finished, inputs, capsys):
    places = {"OUT": str(finished[0]), "DATA": inputs["data"]}
    assert said in error_line(capsys, *(places.get(argument, argument) for argument in arguments))


def test_an_adapter_is_exported(finished, capsys, tmp_path):
    command = ["export", finished[0], "--to", "gguf", "--output", tmp_path / "new"]
    assert run(*command) == 0
    said = capsys.readouterr()
    assert said.out == (
        f"{tmp_path / 'new'}: Modelfile, adapter.gguf, celora_export.json\n28 tensors read back and compared\n"
        f"Run it: llama-cli -m BASE.gguf --lora {tmp_path / 'new' / 'adapter.gguf'}\n"
    )
    assert said.err == ""
    assert "exists; --overwrite replaces it" in error_line(capsys, *command)
    assert run(*command, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 28
    assert run(*command, "--overwrite", "-q") == 0
    assert capsys.readouterr().out == ""
