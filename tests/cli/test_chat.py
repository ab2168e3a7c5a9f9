"""quamba chat and chat.py: scripts on standard input, and a terminal."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import quamba
from quamba.cli.chat import TESTING_PROMPTS, _typed_lines
from quamba.cli.main import main
from quamba.runtime.conversation import Conversation
from quamba.runtime.sampling import SamplingParams

Refused = Callable[..., str]
Chat = Callable[..., Result]
TINY = ("mamba2-tiny", "--template", "zephyr", "--genlen", "8", "--device", "cpu")


@pytest.fixture
def chat(here: Path) -> Chat:
    """chat(line, ..., options=...) -> the result of these lines on standard input."""

    def invoke(*lines: str, options: tuple[str, ...] = ()) -> Result:
        text = "".join(f"{line}\n" for line in lines)
        result = CliRunner().invoke(main, ["chat", *TINY, *options], input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def expected(*questions: str, sampling: SamplingParams | None = None) -> Iterator[str]:
    """What the library answers to the same questions, as printed."""
    model = quamba.load("mamba2-tiny")
    sampling = sampling or SamplingParams(repetition_penalty=1.2)
    conversation = Conversation(
        model.network,
        model.require_tokenizer(),
        "zephyr",
        sampling=sampling,
        max_new_tokens=8,
        seed=1234,
    )
    for question in questions:
        answer = "".join(conversation.say(question)).lstrip()
        answer = answer if answer.endswith("\n") else answer + "\n"
        yield answer.replace("\r\n", "\n")  # as click's runner gives what was printed


def test_answers_are_the_librarys(chat: Chat) -> None:
    result = chat("Where is the ship?", "", "  ", " and the sea? ")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(expected("Where is the ship?", "and the sea?"))


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--temperature", 9.0, "temperature"),
        ("--topk", 3, "top_k"),
        ("--topp", 0.3, "top_p"),
        ("--minp", 0.3, "min_p"),
        ("--repetition_penalty", 4.0, "repetition_penalty"),
    ],
)
def test_every_flag_of_sampling_arrives(chat: Chat, flag: str, value: float, field: str) -> None:
    free = SamplingParams(temperature=2.0, top_k=0, repetition_penalty=1.2)
    base = ("--temperature", "2", "--topk", "0")
    result = chat("x", "y", options=(*base, flag, str(value)))
    given = "".join(expected("x", "y", sampling=replace(free, **{field: value})))
    assert result.stdout == given != "".join(expected("x", "y", sampling=free))


def test_commands(chat: Chat, here: Path) -> None:
    answers = list(expected("x", "y"))
    result = chat("x", "y", "/undo", "y", "/save talk", "/reset", "x", "/load talk", "/undo", "/stats")
    assert result.exit_code == 0, result.stderr
    *printed, first, second = result.stdout.split("\n")[:-1]
    assert "\n".join(printed) + "\n" == "".join([*answers, answers[1], answers[0]])
    assert first.startswith("1 turn, 0 tokens, state 0.00 MiB,")
    assert second.startswith("Last answer: ")
    notes = [
        "Taken back: y",
        "Saved to 'talk'.",
        "All turns are forgotten.",
        "Loaded 2 turns",
        "Taken back: y",
    ]
    lines = result.stderr.splitlines()
    assert [line[: len(note)] for line, note in zip(lines, notes, strict=True)] == notes
    assert (here / "talk").is_file()


def test_a_saved_conversation_goes_on_in_another_run(chat: Chat) -> None:
    answers = list(expected("x", "y", "z"))
    assert chat("x", "y", "/save talk").stdout == "".join(answers[:2])
    result = chat("/load talk", "z")
    assert result.stdout == answers[2]
    assert "read again" not in result.stderr


def test_the_system_text(chat: Chat) -> None:
    lines = ("x", "/save one", "/system Be brief.", "y", "/save two", "/system", "z", "/save three")
    result = chat(*lines, options=("--system", "Be kind."))
    assert result.exit_code == 0, result.stderr
    assert [told("one")[0], told("two")[0], told("three")[0]] == ["Be kind.", "Be brief.", "x"]
    notes = [line for line in result.stderr.splitlines() if not line.startswith("Saved")]
    assert [notes[0], notes[2]] == ["The system text is set.", "There is no system text now."]
    assert all(note.startswith("The conversation was read again (") for note in notes[1::2])


def told(path: str) -> list[str]:
    """The messages in a file."""
    model = quamba.load("mamba2-tiny")
    conversation = Conversation(model.network, model.require_tokenizer(), "zephyr")
    conversation.load(path)
    return [message.content for message in conversation.messages]


def test_help_lists_the_commands_and_exit_leaves(chat: Chat) -> None:
    result = chat("/help", "/exit", "x")
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == [f"/{n}" for n in ("reset", "system", "save", "load", "undo", "stats", "help", "exit")]


def test_a_line_that_begins_with_a_space_is_no_command(chat: Chat) -> None:
    assert chat(" /help").stdout == "".join(expected("/help"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/rest", "There is no '/rest', expected one of /reset, "),
        ("/rest", "Did you mean 'reset'?"),
        ("/", "There is no '/'"),
        ("/save", "/save lacks a file name, expected /save FILE."),
        ("/load nowhere", "'nowhere' does not exist"),
        ("/save none/talk", "'none/talk' is in no folder that exists; make 'none' first."),
        ("/save eval.txt", "'eval.txt' is no saved conversation; choose another name"),
        ("/undo", "There is no turn to take back."),
        ("/undo 2", "/undo takes nothing after it, but there is '2'."),
    ],
)
def test_the_first_error_ends_a_script(chat: Chat, line: str, sentence: str) -> None:
    result = chat(line, "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ") and sentence in result.stderr


def test_the_testing_prompts(chat: Chat) -> None:
    result = chat("not read", options=("--use_testing_prompts", "--cache_graph"))
    answers = expected(*TESTING_PROMPTS)
    assert result.stdout == "".join(f"> {p}\n{a}" for p, a in zip(TESTING_PROMPTS, answers, strict=True))
    assert len(set(TESTING_PROMPTS)) == 4
    assert result.stderr == "--cache_graph has no effect on a CPU.\n"


def test_quantized_and_plain(chat: Chat, here: Path) -> None:
    quantize = ("--quantize", "--calib_data", "calib.txt", "--calib_data_num", "4", "--calib_seqlen", "32")
    result = chat("x", "/save talk", "/stats", options=(*quantize, "--template", "none"))
    assert result.exit_code == 0, result.stderr
    assert "1 turn, " in result.stdout
    other = chat("/load talk")
    assert (other.exit_code, "states of another format" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "'mamba2-tiny' has no chat template, expected --template zephyr"),
        (("--template", "zefyr"), "Did you mean 'zephyr'?"),
        (("--template", "none", "--topp", "0"), "top_p is 0.0, expected"),
        (("--template", "none", "--genlen", "0"), "0 is not in the range x>=1"),
    ],
    ids=["no-template", "unknown-template", "topp", "genlen"],
)
def test_bad_options(refused: Refused, options: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(main, "chat", "mamba2-tiny", *options)


def test_the_template_is_looked_for_before_the_model(refused: Refused) -> None:
    assert "Did you mean 'zephyr'?" in refused(main, "chat", "nowhere", "--template", "zefyr")


def test_bytes_that_are_no_text(repo_root: Path, here: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repo_root / "chat.py"), *TINY],
        input=b"x\n\xff\xff\n",
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert b"Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]  # a machine without fast kernels is told so before
    assert (done.returncode, last[:36]) == (2, b"Error: Standard input is no UTF-8 te")


def test_control_c_at_the_prompt_does_not_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: Iterator[str | type[BaseException]] = iter(["a", KeyboardInterrupt, "b", EOFError])

    def type_in(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_in)
    assert list(_typed_lines()) == ["a", "b"]
    assert capsys.readouterr().err == "Ctrl-D or /exit leaves.\n"


class Terminal:
    """chat.py in a terminal of its own."""

    def __init__(self, script: Path, *arguments: str) -> None:
        import pty

        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="dumb", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, str(script), *arguments])
        self.text = ""
        self.end = time.monotonic() + 60

    def read(self) -> None:
        """Wait for some more text."""
        ready, _, _ = select.select([self.file], [], [], max(0.0, self.end - time.monotonic()))
        assert ready, self.text
        try:
            self.text += os.read(self.file, 4096).decode(errors="replace").replace("\r\n", "\n")
        except OSError:  # Linux's way to say that the other end is closed
            pytest.fail(self.text)

    def until(self, ending: str) -> str:
        """What came up to a text, which must come within some time of the start."""
        while ending not in self.text:
            self.read()
        before, _, self.text = self.text.partition(ending)
        return before

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def status(self) -> int:
        """Of the process, which must have left by itself."""
        while time.monotonic() < self.end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError("still there")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.file)


@pytest.fixture
def terminal(repo_root: Path, here: Path) -> Iterator[Terminal]:
    """With a model that draws random bytes and knows no token to end an answer with."""
    shutil.copytree((here / "mamba2-tiny").resolve(), here / "endless")
    file = here / "endless" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|nothing|>"))
    options = ("--template", "none", "--genlen", "10000000", "--topk", "0", "--temperature", "9")
    started = Terminal(repo_root / "chat.py", "endless", *options, "--device", "cpu")
    yield started
    started.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_in_a_terminal(terminal: Terminal) -> None:
    assert "Ctrl-D leaves" in terminal.until("> ")
    terminal.type("abc\n")
    terminal.until("abc\n")
    while len(terminal.text) < 20:
        terminal.read()
    terminal.type("\x03")
    terminal.until("\n> ")
    terminal.type("/stats\n")
    assert "1 turn, " in terminal.until("\n> ")
    terminal.type("/rest\n")
    assert "Did you mean 'reset'?" in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.status() == 0
