"""The command lines of llama.py and whisper.py: what they print, and their errors in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers

import generate_text
import llama
import transcribe
from tests.examples.test_checkpoints import LLAMA, saved

WORDS = ["<unk>", "<end>", "a", "b", "c", "d", "e", "f", "g", "h", "i"]


def directory(path: Path, kind: str) -> Path:
    """A directory as save_pretrained writes it, with a tokenizer of eleven words."""
    saved(path, kind)
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    generation = {"decoder_start_token_id": 2, "eos_token_id": 1}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with models, and files that cannot be used."""
    monkeypatch.chdir(tmp_path)
    for kind in ("llama", "gpt2", "whisper", "clip"):
        directory(tmp_path / kind, kind)
    directory(tmp_path / "deeper", "llama")
    saved(tmp_path / "deeper", "llama", {"num_hidden_layers": 3})
    directory(tmp_path / "truncated", "llama")
    file = tmp_path / "truncated" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    directory(tmp_path / "wordless", "llama")
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    wavfile.write("tone.wav", 8000, (np.sin(np.arange(4000)) * 9999).astype(np.int16))
    wavfile.write("long.wav", 8000, np.ones(9000, np.int16))
    Path("text.wav").write_text("no sound at all")
    return tmp_path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_text_goes_on(kind, here, capsys):
    arguments = ["--weights", kind, "--prompt", "a b c", "--tokens", "5"]
    assert generate_text.main(arguments) == 0
    text, speed = capsys.readouterr().out.splitlines()
    assert text.startswith("a b c ")
    assert 4 <= len(text.split()) <= 8
    assert set(text.split()) <= set(WORDS)
    assert re.fullmatch(r"[1-5] tokens: the first after .* s(, then .* a second)?", speed)


def test_a_sound_is_written_down(here, capsys):
    assert transcribe.main(["--weights", "whisper", "--sound", "tone.wav"]) == 0
    (text,) = capsys.readouterr().out.splitlines()
    assert set(text.split()) <= set(WORDS)


PROMPT = ["--prompt", "a b c", "--tokens", "5"]
SOUND = ["--sound", "tone.wav"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "whisper", *PROMPT], "of a model of type 'whisper', class 'WhisperFor"),
        (["--weights", "truncated", *PROMPT], "cannot be read as safetensors: "),
        (["--weights", "deeper", *PROMPT], "of this configuration: 9 missing."),
        (["--weights", "wordless", *PROMPT], "tokenizer.json cannot be read as a tokenizer: "),
        (["--weights", "nowhere", *PROMPT], "cannot be read as JSON: "),
        (["--weights", "llama", "--prompt", ""], 'The prompt is empty. Give one: --prompt "..."'),
        (["--weights", "llama", "--prompt", " "], "The prompt is empty."),
        (
            ["--weights", "llama", "--prompt", "a b c", "--tokens", "30"],
            "The prompt has 3 tokens, and 30 are to be added; the model takes 32 in all.",
        ),
        (
            ["--weights", "gpt2", "--prompt", "a " * 20, "--tokens", "1"],
            "The prompt has 20 tokens, and 1 are to be added; the model takes 16 in all.",
        ),
        (["--weights", "llama", *PROMPT, "--tokens", "0"], "--tokens is 0. Ask for 1 or more."),
        (["--weights", "llama"], "the following arguments are required: --prompt"),
    ],
)
def test_errors_of_texts(arguments, message, here, capsys):
    assert_one_line(generate_text.main, arguments, "llama.py", message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "llama", *SOUND], "of a model of type 'llama', class 'LlamaForCausalLM'."),
        (["--weights", "clip", *SOUND], "of a model of type 'clip', class 'CLIPModel'."),
        (["--weights", "whisper", "--sound", "long.wav"], "is 1.1 s long; the model takes 1 s at"),
        (["--weights", "whisper", "--sound", "text.wav"], "text.wav cannot be read as WAV: "),
        (["--weights", "whisper", "--sound", "no.wav"], "no.wav cannot be read as WAV: "),
        (["--weights", "whisper"], "the following arguments are required: --sound"),
    ],
)
def test_errors_of_sounds(arguments, message, here, capsys):
    assert_one_line(transcribe.main, arguments, "whisper.py", message, capsys)


def assert_one_line(main, arguments, program, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith(f"{program}: ")
    assert printed.err.count("\n") == 1


def test_the_file_is_a_program(here):
    command = [sys.executable, llama.__file__, "--weights", "clip", "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("llama.py: The configuration is of a model of type 'clip'")
    assert LLAMA["architectures"][0] in done.stderr
