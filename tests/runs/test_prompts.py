"""One sample for each of many prompts, from Python and from a file."""

import pytest
from models import small_model

import charlm
from charlm.inference.rows import RowBatch
from charlm.runs.prompts import draw_each
from charlm.system.errors import ConfigError

PROMPTS = ["the cat", "that", "the cat", "said, and sat on the mat; "]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "run"
    small_model(**{"sample.length": 20, "sample.num_samples": 5, "sample.random_prompt": 3}).save(path)
    return path


def test_the_sample_of_a_prompt_does_not_depend_on_the_other_prompts(path):
    model = charlm.load(path)
    found = model.sample(PROMPTS, seed=3)
    assert len(found) == 4 and found[0] != found[2]  # The same prompt has another random key at another place.
    assert found[0] == model.sample(PROMPTS[0], seed=3) and found == model.sample([*PROMPTS, "more"], seed=3)[:4]
    assert model.sample([PROMPTS[0]] * 3, seed=3) == [found[0], *model.sample([PROMPTS[1], *PROMPTS[:1] * 2], seed=3)[1:]]
    assert model.sample(["the"], seed=3, stop="e", greedy=True, length=9) == [
        model.sample("the", stop="e", greedy=True, length=9)
    ]


def test_the_command_draws_a_sample_for_each_line_of_a_file(path, run, tmp_path):
    file = tmp_path / "prompts.txt"
    command = "sample", f"--workdir={path}", f"--prompt_file={file}", "--seed=3"
    expected = "".join(f"{prompt}{text}\n" for prompt, text in zip(PROMPTS, charlm.load(path).sample(PROMPTS, seed=3)))
    for ends in ("\n", "\r\n"):
        file.write_bytes(b"\xef\xbb\xbf" + ends.join([*PROMPTS, ""]).encode())
        code, out, _ = run(*command)
        assert code == 0 and out == expected
    for content, message in (
        ("", "prompts.txt is empty; it must hold one prompt a line"),
        ("the\n\nthat\n", "prompt 2 of 3 is empty"),
        ("the\nthat\nthé\n", "prompt 3 of 3: sample.prompt: symbol 'é' at position 2 is not in the vocabulary"),
    ):
        file.write_text(content)
        code, out, err = run(*command)
        assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    file.write_text("".join(prompt + "\n" for prompt in PROMPTS))
    assert run(*command, "--prompts_at_once=3")[:2] == (0, expected)
    assert "--prompts_at_once needs --prompt_file" in run("sample", f"--workdir={path}", "--prompts_at_once=3")[2]
    for flag in ("--prompt=the", "--num_samples=2", "--random_prompt=2"):
        code, out, err = run(*command, flag)
        assert code == 2 and out == "" and flag.split("=")[0].removeprefix("--") in err
    assert run("sample", f"--workdir={path}", "--prompt_file=none.txt")[0] == 2


@pytest.mark.parametrize("kind, stop", [("chars", None), ("chars", "e"), ("bytes", "\n")])
def test_prompts_that_are_drawn_together_have_the_texts_of_each_one_alone(kind, stop):
    model = small_model(kind=kind, scale=1.0)
    prompts = ["the cat"] * 3 + ["that was that, said the cat, and sat.\n" * 4] + ["t", "said, ", "ate the rat"]
    alone = model.sample(prompts, seed=3, length=45, stop=stop)
    for at_once in (2, 3, 7, 50):
        assert model.sample(prompts, seed=3, length=45, stop=stop, prompts_at_once=at_once) == alone


def test_a_long_prompt_holds_up_only_its_own_row(monkeypatch):
    blocks, dispatch = [], RowBatch.dispatch
    monkeypatch.setattr(RowBatch, "dispatch", lambda self, rows: blocks.append(len(rows)) or dispatch(self, rows))
    drawn = draw_each(small_model(), ["the cat " * 60, *["the cat"] * 12], {"length": 40}, 0, at_once=3)
    # The long text takes 9 blocks of 64 symbols and the others one block each, in two rows. The first text comes when the model
    # has read its prompt, and texts that are complete wait for it.
    assert next(drawn[0][1]) and blocks == [3] * 6 + [1] * 2
    assert [len("".join(text for (text,) in pieces)) for _, pieces in drawn[1:]] == [40] * 12 and len(blocks) == 8


def test_what_is_no_prompt_is_refused(path):
    model = charlm.load(path)
    for prompts, changes, message in (
        (["the", 3], {}, r"prompt is \['the', 3\], of type list; it must be of type str or Sequence\[str\] or None"),
        (["the", ""], {}, "prompt 2 of 2 is empty"),
        (["the"], {"num_samples": 2}, "num_samples is 2, but each of several prompts has one sample"),
        (["the"], {"prompts_at_once": 0}, "prompts_at_once is 0; it must be at least 1"),
        ("the", {"prompts_at_once": 2}, "prompts_at_once is 2, but there is one prompt"),
        (["the"], {"temperature": 0.0}, "prompt 1 of 1: .*sample.temperature is 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.sample(prompts, **changes)
    assert model.sample([]) == []
