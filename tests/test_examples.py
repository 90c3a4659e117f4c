"""The examples in docs/ run. `make demo` runs them in full; here, briefly."""

import runpy
from pathlib import Path

DIGITS = Path(__file__).parent.parent / "docs/examples/digits_autoencoder.py"


def test_digits_autoencoder(tmp_path, capsys):
    main = runpy.run_path(str(DIGITS))["main"]
    picture = tmp_path / "digits.png"
    assert main(["--steps", "30", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "360 held-out images, label masked" in printed
    assert "f32[b, 8, 8], i32[b]" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "MultimodalDecoding" in picture.with_suffix(".svg").read_text()
