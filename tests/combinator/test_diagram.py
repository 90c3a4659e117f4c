"""A picture tells the truth about the wiring, and can be read."""

import functools
import re
import sys
from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import testing
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._diagram.svg import COLOURS, MAX_LABEL_LENGTH
from flax_extra.combinator._diagram.svg import draw_diagram as drawn_with
from tests.combinator import free
from tests.combinator.drawn import Drawn
from tests.combinator.pictures import FOLDER, PICTURES, draw

# What the picture says is what the expression means.


class Everywhere(dict):
    """What is on the stack at every step, made up."""

    def __init__(self, inputs):
        super().__init__({(): (inputs, ["out"] * 9)})

    def __contains__(self, position):
        return True

    def __missing__(self, position):
        text = "".join(map(str, position))
        return ["f32[b, t, 64]"] * 9, [f"f32[{text}, {i}]" for i in range(9)]


OPERATIONS = {
    "+": "add",
    "\N{MINUS SIGN}": "sub",
    "\N{MULTIPLICATION SIGN}": "mul",
    "\N{DIVISION SIGN}": "truediv",
}
ARITHMETIC = st.builds(
    lambda build, n: build(n), st.sampled_from([cb.add, cb.sub, cb.mul, cb.div]), st.integers(1, 5)
)


FOLDS = st.builds(cb.fold, st.just(free.Function("f", cb.Signature(2, 1))), st.integers(1, 4))
# A fold is one box, named after what it folds with: here always a function.
few = free.pipelines(
    st.one_of(free.fresh_layers, ARITHMETIC, FOLDS), set(testing.SHUFFLING) - {"fold"}
)
pipelines = st.lists(few, min_size=1, max_size=5).map(cb.serial)


def call(box, items, n_out):
    """What a box gives, in the terms of the free algebra."""
    name = box.words[0].text
    if name == "fold" or name in OPERATIONS:
        f = OPERATIONS.get(name) or box.words[1].text
        folded = items[0]
        for item in items[1:]:
            folded = free.call(f, (folded, item), 1)
        return (folded,)
    term = free.call("layer " if name in ("Layer", "Other") else name, items, n_out)
    return term if isinstance(term, tuple) else (term,)


def calls_counted(f):
    """What ``f`` gives, and every call of a function or layer that it makes."""
    made, original = Counter(), free.call

    def counting(name, items, n_out):
        made[name, items, n_out] += 1
        return original(name, items, n_out)

    arithmetic = {
        f"__{name}__": functools.partialmethod(lambda a, name, b: free.call(name, (a, b), 1), name)
        for name in OPERATIONS.values()
    }
    # A picture does not say which parameters a layer has.
    with (
        mock.patch.multiple(free.Term, create=True, **arithmetic),
        mock.patch.object(free, "Path", return_value=""),
        mock.patch.object(free, "call", counting),
    ):
        return f(), made


@given(p=pipelines, n_extra=st.integers(0, 2), has_labels=st.booleans())
def test_the_wires_lead_where_the_expression_says(p, n_extra, has_labels):
    items = [free.Term("x", (), i) for i in range(p.signature.n_in + n_extra * has_labels)]
    output, made = calls_counted(lambda: p.init_with_output(free.KEY, *items)[0])
    expected = output if isinstance(output, tuple) else (output,)
    picture = Drawn(drawn_with(p, Everywhere(["x"] * len(items)) if has_labels else None).svg)
    given, drawn = calls_counted(lambda: picture.evaluate(call, items))
    assert given == expected
    assert drawn == made


@settings(max_examples=settings.default.max_examples // 2)
@given(p=pipelines, n_extra=st.integers(0, 2), has_labels=st.booleans())
def test_nothing_lies_on_anything_else(p, n_extra, has_labels):
    items = ["i32[b, t, 3]"] * (p.signature.n_in + n_extra)
    picture = Drawn(drawn_with(p, Everywhere(items) if has_labels else None).svg)
    assert not list(picture.faults())


@settings(max_examples=settings.default.max_examples // 4)
@given(p=pipelines)
def test_equal_expressions_have_one_picture(p):
    assert cb.diagram(p).svg == cb.diagram(p.clone()).svg


@pytest.mark.parametrize("name", PICTURES)
def test_pinned_pictures_have_no_faults(name):
    assert not list(Drawn((FOLDER / f"{name}.svg").read_text(encoding="utf-8")).faults())


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_as_they_were(name):
    pinned = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert draw(name).svg == pinned, (
        f"{name} is drawn otherwise; look at it: python -m tests.combinator.pictures"
    )


def test_no_pinned_picture_is_left_over():
    assert {path.stem for path in FOLDER.iterdir()} == set(PICTURES)


# What is written in it.


def texts(picture):
    """All texts, from the top down, as they are selected and read aloud."""
    return re.findall(r"<text[^>]*>(.*?)</text>", picture.svg)


def labels(picture):
    return [text for text in texts(picture) if "[" in text]


def test_boxes_are_named_with_what_is_set():
    picture = cb.diagram(cb.serial(nn.Embed(256, 64), cb.fn(max, n_in=2, n_out=1, key=None)))
    assert texts(picture) == ["Embed", "num_embeddings=256,", "features=64", "max", "key=None"]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (cb.residual(abs), ["residual", "abs", "+"]),
        (cb.repeat(abs, 6), ["repeat \N{MULTIPLICATION SIGN}6", "abs"]),
        (cb.repeat(abs, 2, shared=True, remat=True, name="t"), ["t: repeat \N{MULTIPLICATION SIGN}2, shared, remat", "abs"]),
        (cb.scan(cb.add() >> cb.dup(), reverse=True), ["scan, reverse", "+"]),
        (cb.serial(abs, name="encoder"), ["encoder", "abs"]),
        (cb.residual(abs, name="block"), ["block: residual", "abs", "+"]),
        (cb.serial(cb.fn(nn.Dropout(0.5) >> cb.identity(), deterministic=False)),
         ["fn, deterministic=False", "Dropout", "rate=0.5"]),
        (cb.serial(cb.sub(), cb.mul(), cb.div(), cb.add(4)), ["\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{DIVISION SIGN}", "+"]),
        (cb.serial(cb.concatenate(), cb.split(2, axis=1)), ["concat", "split, axis=1"]),
        (cb.fold(np.maximum, 3), ["fold", "maximum"]),
        (cb.fn(nn.Embed(9, 4).attend), ["Embed.attend", "num_embeddings=9,", "features=4"]),
        (cb.fn(functools.partial(jnp.sum, axis=1), n_in=1), ["sum", "axis=1"]),
        (cb.typed(cb.residual(nn.relu), "f32[b] -> f32[b]"), ["residual", "relu", "+"]),
        (cb.serial(cb.swap(), cb.dup(), cb.drop(), cb.identity(), cb.select((1, 0))), []),
    ],
)  # fmt: skip
def test_words(p, expected):
    assert texts(cb.diagram(p)) == expected


class PreNorm(cb.Combinator):
    def expand(self, norm, *body):
        return cb.residual(norm, *body)


class Towers(cb.Combinator):
    def expand(self, f):
        return cb.repeat(f, 3)


class Double(cb.Combinator):
    def expand(self):
        return cb.dup() >> cb.add()


class Opaque(cb.Combinator):
    @property
    def signature(self):
        return cb.Signature(1, 1)

    def __call__(self, x):
        return x


def test_what_a_user_derives_keeps_its_own_name():
    p = PreNorm([nn.LayerNorm(), cb.residual(abs)]) >> Double() >> Towers([abs])
    assert texts(cb.diagram(p)) == [
        "pre_norm", "LayerNorm", "residual", "abs", "+", "+",
        "double", "+",
        "towers", "repeat \N{MULTIPLICATION SIGN}3", "abs",
    ]  # fmt: skip


def test_what_runs_in_a_way_of_its_own_is_a_box():
    (box,) = Drawn(cb.diagram(Opaque([abs]) >> cb.serial()).svg).boxes
    assert box.words[0].text == "opaque"


def test_layers_functions_and_merges_look_different():
    boxes = Drawn(cb.diagram(cb.serial(nn.Dense(4), nn.relu, cb.add())).svg).boxes
    assert [box.kind for box in boxes] == ["layer", "function", "pill"]


def test_a_long_text_is_cut_and_told_in_full_by_the_pointer():
    layer = nn.Dense(4, name="a_name_that_is_long_enough_to_be_cut")
    (box,) = Drawn(cb.diagram(layer).svg).boxes
    assert [words.text for words in box.words] == [
        "Dense",
        "features=4,",
        "name='a_name_that_is_lo...",
    ]
    many = cb.fn(lambda a, b=1, c=2, d=3, e=4: a, b="b" * 20, c="c" * 20, d="d" * 20, e="e" * 20)
    (box,) = Drawn(cb.diagram(many).svg).boxes
    assert box.words[-1].text == "..."
    assert "eeee" in box.tip


# Labels.


def test_wires_have_no_labels_without_inputs():
    assert labels(cb.diagram(cb.residual(nn.LayerNorm(), nn.Dense(8)))) == []


def test_each_wire_says_what_flows_in_it():
    p = cb.serial(nn.Embed(9, 8), cb.residual(nn.Dense(8)), cb.parallel(nn.Dense(2), nn.Dense(3)))
    picture = cb.diagram(p, "i32[b, t]", "f32[b, 5]", "bool[b]")
    assert labels(picture) == [
        "i32[b, t]", "f32[b, 5]", "bool[b]",
        "f32[b, t, 8]", "f32[b, t, 8]", "f32[b, t, 8]",
        "f32[b, t, 2]", "f32[b, 3]",
    ]  # fmt: skip


def test_wires_that_cross_are_labelled_again():
    assert labels(cb.diagram(cb.swap(), "i32[a]", "f32[b]")) == [
        "i32[a]",
        "f32[b]",
        "f32[b]",
        "i32[a]",
    ]
    assert labels(cb.diagram(cb.dup(), "i32[a]")) == ["i32[a]"]


def test_inside_a_repeat_an_item_is_that_of_one_copy():
    layer = cb.fn(lambda x, scale: x * scale) >> cb.dup()
    svg = cb.diagram(cb.repeat(layer, 6, n_carry=1), "f32[b, 4]", "f32[6]").svg
    assert "6, n_carry=1" in svg
    for text in ("f32[6]", "f32[]", "f32[b, 4]", "f32[6, b, 4]"):
        assert f">{text}<" in svg, text


def test_inside_a_scan_a_sequence_is_one_item():
    picture = cb.diagram(cb.scan(cb.add() >> cb.dup()), "f32[b]", "f32[b, t]")
    assert labels(picture) == ["f32[b]", "f32[b, t]", "f32[b]", "f32[b]", "f32[b, t]"]


def test_every_label_is_what_the_summary_says():
    p, inputs = PICTURES["perceiver"]
    summary = cb.summary(p, *inputs)
    known = {describe_item(i) for s in [summary.root, *summary.root.steps()] for i in s.after}
    assert set(labels(cb.diagram(p, *inputs))) <= known | set(inputs)


def test_items_that_are_no_arrays_have_labels():
    picture = cb.diagram(cb.fn(lambda x, y: x.shape[0], n_out=1), "f32[3*b]", None)
    assert texts(picture) == ["f32[3*b]", "None", "&lt;lambda&gt;", "3*b"]
    wide = cb.diagram(cb.identity(), ["f32[b, t, 64]"] * 20)
    assert max(map(len, texts(wide))) == MAX_LABEL_LENGTH


def test_context_reaches_the_steps():
    p = nn.Dropout(0.5) >> cb.serial(nn.Dense(3))
    assert labels(cb.diagram(p, "f32[b, 4]", deterministic=True))[-1] == "f32[b, 3]"


def test_arrays_serve_as_inputs_and_nothing_is_computed():
    def never(x):
        assert isinstance(x, jax.core.Tracer)
        return x

    assert labels(cb.diagram(cb.fn(never), np.ones((2, 3), np.float32))) == [
        "f32[2, 3]",
        "f32[2, 3]",
    ]


# Errors.


def test_what_a_step_raises_is_raised_with_its_note():
    p = cb.serial(nn.Dense(5), cb.residual(nn.Dense(3)))
    with pytest.raises(TypeError, match="incompatible shapes") as caught:
        cb.diagram(p, "f32[b, 8]")
    note = caught.value.__notes__[0]
    assert note.startswith("flax_extra: in serial[1] -> residual -> add\n  signature: 2 -> 1\n")


def test_too_few_inputs():
    with pytest.raises(cb.SignatureError, match="takes 2"):
        cb.diagram(cb.add(), "f32[b]")


def test_what_is_not_a_pipeline():
    with pytest.raises(TypeError, match="A pipeline is made of callables"):
        cb.diagram(3)
    with pytest.raises(ValueError, match="spec"):
        cb.diagram(abs, "f32[b")
    with pytest.raises(TypeError, match="deterministic"):
        cb.diagram(cb.serial(abs), deterministic=True)


def test_saved_as_svg_only(tmp_path):
    picture = cb.diagram(cb.swap())
    with pytest.raises(ValueError, match=r"^A diagram is saved as SVG, in a file") as caught:
        picture.save(tmp_path / "swap.png")
    assert str(caught.value) == (
        "A diagram is saved as SVG, in a file whose name ends in .svg; got "
        f"{str(tmp_path / 'swap.png')!r}. Save it under such a name, and convert it with another program."
    )
    assert not list(tmp_path.iterdir())
    picture.save(str(tmp_path / "swap.svg"))
    assert (tmp_path / "swap.svg").read_bytes() == picture.svg.encode()


# As SVG.


def test_it_shows_itself_and_tells_what_it_shows():
    p = cb.residual(nn.Dense(4), name="block")
    picture = cb.diagram(p)
    root = Drawn(picture.svg).root
    assert picture._repr_svg_() == str(picture) == picture.svg
    assert repr(picture) == f"Diagram({len(picture.svg)} bytes of SVG)"
    assert (root.get("role"), root[0].text) == ("img", "Wiring of block: 1 -> 1")
    assert root[1].text == str(p)


def test_names_are_escaped():
    def f(x):
        return x

    f.__name__ = "<a & 'b'>\x00\ud800"
    picture = cb.diagram(cb.serial(f, name="</svg>"))
    drawn = Drawn(picture.svg)
    assert drawn.boxes[0].words[0].text == "<a & 'b'>\ufffd\ufffd"
    assert drawn.words[0].text == "</svg>"


def test_nothing_in_it_differs_from_run_to_run():
    class Setting:
        pass

    p = cb.serial(
        functools.partial(lambda x, s: x, s=Setting()), nn.Dense(4, kernel_init=lambda *_: 0)
    )
    picture = cb.diagram(p)
    assert not re.search(r"0x[0-9a-f]{6}|\bid=", picture.svg)


def test_it_is_dark_where_the_reader_asks_for_dark_and_light_everywhere_else():
    svg = cb.diagram(cb.serial(nn.Dense(4), nn.relu, cb.add(), cb.drop(), cb.dup())).svg
    (style,) = re.findall(r"<style>(.*?)</style>", svg)
    dark = "@media (prefers-color-scheme:dark){"
    assert style.startswith(dark)
    assert all(
        rule.startswith(".flax-extra-diagram .") for rule in style[len(dark) : -2].split("}")
    )
    for name in set(re.findall(r'class="([a-z]+)"', svg)):
        (fill, stroke), (dark_fill, dark_stroke) = COLOURS[name]
        assert f'class="{name}" fill="{fill}" stroke="{stroke}"' in svg
        assert f".{name}{{fill:{dark_fill};stroke:{dark_stroke}}}" in style


def test_text_stands_out_from_what_is_behind_it():
    for mode in (0, 1):
        for text in ("name", "small"):
            for behind in ("canvas", "layer", "function", "pill"):
                ratio = contrast(COLOURS[text][mode][0], COLOURS[behind][mode][0])
                assert ratio > 4.5, (mode, text, behind)  # WCAG 2.2, 1.4.3
        for line in ("frame", "wire", "layer", "function", "pill", "end"):
            assert contrast(COLOURS[line][mode][1], COLOURS["canvas"][mode][0]) > 3  # 1.4.11


def contrast(a, b):
    """WCAG 2.2's contrast ratio of two colours."""
    bright, dull = sorted(map(luminance, (a, b)), reverse=True)
    return (bright + 0.05) / (dull + 0.05)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# At any size.


def test_sixty_boxes_are_as_narrow_as_six():
    drawn = Drawn(draw("sixty_boxes").svg)
    assert len(drawn.boxes) >= 60
    assert drawn.canvas.right - drawn.canvas.left < 300
    columns = {wire.start[0] for wire in drawn.wires}
    assert len(columns) == 2, "the way down is one line, and all shortcuts are one beside it"


def test_drawing_takes_time_in_proportion():
    def calls(n):
        p = cb.serial([cb.residual(nn.LayerNorm(), nn.Dense(8)) for _ in range(n)])
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event == "call"

        cb.diagram(p)
        sys.setprofile(profile)
        try:
            cb.diagram(p)
        finally:
            sys.setprofile(None)
        return count

    assert calls(80) < 2.2 * calls(40)


def test_a_bound_pipeline_is_drawn_as_the_pipeline():
    p = cb.serial(nn.Dense(4), cb.repeat(nn.Dense(4), 3))
    bound = p.bind(jax.eval_shape(p.init, free.KEY, jnp.ones((1, 4))))
    assert cb.diagram(bound, "f32[b, 4]").svg == cb.diagram(p, "f32[b, 4]").svg
