"""Pairs from files: our columns, two public projects' files as they are, and every way a file can be unusable."""

import csv
import json

import pytest
import torch

from interp import PromptPairs
from interp.errors import TaskError

ROW = {"clean": "w0 w1", "corrupt": "w0 w2", "answer": " w1", "wrong_answer": " w2"}


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


WRITERS = {"pairs.csv": write_csv, "pairs.jsonl": write_jsonl, "pairs.json": write_json}
every_format = pytest.mark.parametrize("name", WRITERS)


def same(a: PromptPairs, b: PromptPairs) -> bool:
    names = ("clean", "corrupt", "answers", "lengths")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


# ------------------------------------------------------------------------------------------------------ our own columns


@every_format
def test_our_own_columns(name, tiny, tmp_path):
    model = tiny("gpt2")
    rows = [ROW, {"clean": "w3 w4 w5", "corrupt": "w3 w6 w5", "answer": " w4", "wrong_answer": " w6"}]
    pairs = PromptPairs.from_file(WRITERS[name](tmp_path / name, rows), model)
    expected = PromptPairs.from_text(
        model, clean=[r["clean"] for r in rows], corrupt=[r["corrupt"] for r in rows],
        answers=[r["answer"] for r in rows], wrong_answers=[r["wrong_answer"] for r in rows],
    )  # fmt: skip
    assert same(pairs, expected)
    assert torch.equal(pairs.wrong_answers, expected.wrong_answers)
    assert pairs.name == "pairs"
    assert pairs.metric == "logit_diff"


def test_from_csv_and_from_jsonl_say_the_kind(tiny, tmp_path):
    model = tiny("gpt2")
    as_csv = PromptPairs.from_csv(write_csv(tmp_path / "a.txt", [ROW]), model)
    as_json = PromptPairs.from_jsonl(write_jsonl(tmp_path / "b.txt", [ROW]), model)
    assert same(as_csv, as_json)
    assert same(as_csv, PromptPairs.from_jsonl(write_json(tmp_path / "c.txt", [ROW]), model))


@every_format
def test_other_spellings_of_the_columns(name, tiny, tmp_path):
    renamed = {"clean_prompt": "w0 w1", "corrupted": "w0 w2", "answers": " w1", "wrong_answers": " w2"}
    assert same(
        PromptPairs.from_file(WRITERS[name](tmp_path / name, [renamed]), tiny("gpt2")),
        PromptPairs.from_file(WRITERS[name](tmp_path / f"own-{name}", [ROW]), tiny("gpt2")),
    )


@every_format
def test_without_wrong_answers_the_metric_needs_none(name, tiny, tmp_path):
    row = {key: value for key, value in ROW.items() if key != "wrong_answer"}
    pairs = PromptPairs.from_file(WRITERS[name](tmp_path / name, [row]), tiny("gpt2"))
    assert pairs.wrong_answers is None
    assert pairs.metric == "log_probability"


def test_several_answers_in_json(tiny, tmp_path):
    row = {"clean": "w0 w1", "corrupt": "w0 w2", "answers": [" w1", " w3"], "wrong_answers": [" w2"]}
    pairs = PromptPairs.from_file(write_jsonl(tmp_path / "p.jsonl", [row, ROW]), tiny("gpt2"))
    one = tiny("gpt2").to_single_token
    assert pairs.answers.tolist() == [[one(" w1"), one(" w3")], [one(" w1"), -1]]


def test_the_first_rows_only(tiny, tmp_path):
    path = write_csv(tmp_path / "p.csv", [ROW, ROW, ROW])
    assert len(PromptPairs.from_file(path, tiny("gpt2"), n=2)) == 2
    assert len(PromptPairs.from_file(path, tiny("gpt2"), n=9)) == 3


def test_a_byte_order_mark_quotes_and_blank_lines_are_no_obstacle(tiny, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('clean,corrupt,answer\r\n"w0 w1",w0 w2," w1"\r\n\r\n', encoding="utf-8-sig")
    assert len(PromptPairs.from_file(path, tiny("gpt2"))) == 1
    path = tmp_path / "p.jsonl"
    path.write_text("\n" + json.dumps(ROW) + "\n\n", encoding="utf-8-sig")
    assert len(PromptPairs.from_file(path, tiny("gpt2"))) == 1


def test_a_quoted_field_may_hold_a_line_break(gpt2_words, tmp_path):
    row = {"clean": 'def f():\n    "one"\n    return', "corrupt": 'def f():\n    "two"\n    return', "answer": " one"}
    pairs = PromptPairs.from_file(write_csv(tmp_path / "p.csv", [row]), gpt2_words)
    assert "".join(pairs.token_strings[0]).endswith(row["clean"])


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c"])
def test_only_line_feeds_end_a_line(separator, gpt2_words, tmp_path):
    row = {"clean": f"one{separator} two", "corrupt": f"one{separator} six", "answer": " two"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in (write_csv(tmp_path / "p.csv", [row]), tmp_path / "p.jsonl"):
        if not (path.suffix == ".jsonl" and separator == "\x0c"):  # JSON writes that one as \f
            assert separator in path.read_text(encoding="utf-8")
        pairs = PromptPairs.from_file(path, gpt2_words)
        assert gpt2_words.tokenizer.decode(pairs.clean[0].tolist()).endswith(row["clean"])


def test_what_is_said_about_the_pairs_is_kept(tiny, tmp_path):
    pairs = PromptPairs.from_file(write_csv(tmp_path / "p.csv", [ROW]), tiny("gpt2"), name="mine", metric="probability")
    assert (pairs.name, pairs.metric) == ("mine", "probability")


# ---------------------------------------------------------------------------------------- other projects' files as they are


def test_eap_igs_greater_than(gpt2_words, shared_data):
    pairs = PromptPairs.from_file(shared_data / "tasks/eap_ig/greater_than_data.csv", gpt2_words, n=20)
    assert len(pairs) == 20
    text = "The contract lasted from the year 1352 to the year 13"
    assert "".join(pairs.token_strings[0]).endswith(text)
    years = [gpt2_words.to_single_token(f"{y:02d}") for y in range(100)]
    assert {t for t in pairs.answers[0].tolist() if t >= 0} == set(years[53:])
    assert {t for t in pairs.wrong_answers[0].tolist() if t >= 0} == set(years[:53])
    assert pairs.differs[0].sum() == 1


def test_eap_igs_ioi_was_written_for_another_tokenizer(gpt2_words, shared_data):
    message = (
        r"ioi_llama\.csv line \d+: (in)?correct_idx \d+ is not in this model's vocabulary of 50257; .*another tokenizer"
    )
    with pytest.raises(TaskError, match=message):
        PromptPairs.from_file(shared_data / "tasks/eap_ig/ioi_llama.csv", gpt2_words)


def test_eap_igs_ioi_for_a_vocabulary_large_enough(gpt2_words, shared_data):
    """Its ids are Llama 3's: taken as they are, whatever they mean here, since no text can say that they are wrong."""
    path = shared_data / "tasks/eap_ig/ioi_llama.csv"
    with path.open(encoding="utf-8") as file:
        rows = [row for _, row in zip(range(2), csv.DictReader(file), strict=False)]
    pairs = PromptPairs.from_file(path, gpt2_words, n=2)
    assert pairs.answers.flatten().tolist() == [int(row["correct_idx"]) for row in rows]
    assert pairs.wrong_answers.flatten().tolist() == [int(row["incorrect_idx"]) for row in rows]
    hard = PromptPairs.from_file(path, gpt2_words, n=2, corrupt_column="corrupted_hard")
    for given, column in ((pairs, "corrupted"), (hard, "corrupted_hard")):
        text = gpt2_words.tokenizer.decode(given.corrupt[0].tolist())
        assert text.endswith(rows[0][column])


def test_feature_circuits_agreement(gpt2_words, shared_data, tmp_path):
    """Its nouns are single tokens of Pythia's; some plurals are two of GPT-2's and are named, the others are read."""
    path = shared_data / "tasks/feature_circuits/data/simple_test.json"
    with pytest.raises(TaskError, match=r"simple_test\.json: clean and corrupt differ in length on prompts 0, 1, 5"):
        PromptPairs.from_file(path, gpt2_words)

    def width(text: str) -> int:
        return gpt2_words.to_tokens(text).shape[1]

    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in map(json.loads, lines) if width(row["clean_prefix"]) == width(row["patch_prefix"])]
    assert len(rows) > 50
    pairs = PromptPairs.from_file(write_jsonl(tmp_path / "simple.json", rows), gpt2_words)
    assert len(pairs) == len(rows)
    first = rows[0]
    assert "".join(pairs.token_strings[0]).endswith(first["clean_prefix"])
    assert pairs.answers[0, 0] == gpt2_words.to_single_token(first["clean_answer"])
    assert pairs.wrong_answers[0, 0] == gpt2_words.to_single_token(first["patch_answer"])


# -------------------------------------------------------------------------------------------------------------- errors


def refused(path, model, message, **options):
    with pytest.raises(TaskError, match=message) as caught:
        PromptPairs.from_file(path, model, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tiny, tmp_path):
    refused(tmp_path / "none.csv", tiny("gpt2"), r"none\.csv cannot be read \(No such file")
    refused(tmp_path, tiny("gpt2"), "cannot be read")


@every_format
def test_an_empty_file_is_named(name, tiny, tmp_path):
    path = tmp_path / name
    path.write_text("")
    refused(path, tiny("gpt2"), "has no pairs in it")


def test_a_header_alone_or_an_empty_array_is_no_pairs(tiny, tmp_path):
    (tmp_path / "p.csv").write_text("clean,corrupt,answer\n")
    refused(tmp_path / "p.csv", tiny("gpt2"), "has no pairs in it")
    (tmp_path / "p.json").write_text("[]")
    refused(tmp_path / "p.json", tiny("gpt2"), "has no pairs in it")


@every_format
def test_bytes_that_are_no_utf8_are_named(name, tiny, tmp_path):
    path = tmp_path / name
    path.write_bytes("clean,corrupt,answer\nÉmile,Émilie, é\n".encode("latin-1"))
    refused(path, tiny("gpt2"), "is not text in UTF-8 .* at byte 21")


def test_a_line_of_json_cut_short_is_named(tiny, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [ROW, ROW])
    path.write_text(path.read_text()[:-20])
    refused(path, tiny("gpt2"), "line 2: not valid JSON .*cut short")


def test_an_array_cut_short_is_named(tiny, tmp_path):
    path = write_json(tmp_path / "p.json", [ROW, ROW])
    path.write_text(path.read_text()[:-20])
    refused(path, tiny("gpt2"), r"line \d+: not valid JSON .*cut short")


def test_a_csv_line_cut_short_is_named(tiny, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("clean,corrupt,answer\nw0 w1,w0 w2, w1\nw0 w1,w0\n")
    refused(path, tiny("gpt2"), "line 3: not as many fields as the header")


def test_a_csv_line_with_too_many_fields_is_named(tiny, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("clean,corrupt,answer\nw0, w1,w0 w2, w1\n")
    refused(path, tiny("gpt2"), "line 2: not as many fields as the header")


@pytest.mark.parametrize("missing", ["clean", "corrupt", "answer"])
@every_format
def test_a_missing_column_is_named_with_those_there_are(name, missing, tiny, tmp_path):
    row = {key: value for key, value in ROW.items() if key != missing}
    column = "answers" if missing == "answer" else missing
    refused(WRITERS[name](tmp_path / name, [row]), tiny("gpt2"), rf"no {column} \(columns: {', '.join(row)}\)")


@pytest.mark.parametrize("empty", ["clean", "corrupt", "answer"])
@every_format
def test_an_empty_field_is_named(name, empty, tiny, tmp_path):
    column = "answers" if empty == "answer" else empty
    refused(WRITERS[name](tmp_path / name, [ROW, ROW | {empty: ""}]), tiny("gpt2"), rf"line \d+: no {column} ")


@pytest.mark.parametrize("line", ["3", "null", '["w0 w1", "w0 w2"]', '"w0 w1"'])
def test_a_line_that_is_no_object_is_named(line, tiny, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    refused(path, tiny("gpt2"), "line 2: expected an object with named fields")


@pytest.mark.parametrize(
    "bad", [{"clean": 3}, {"clean": ["w0", "w1"]}, {"corrupt": {"text": "w0"}}, {"answer": 1.5}, {"answer": {"a": 1}}]
)
def test_a_field_of_the_wrong_type_is_named(bad, tiny, tmp_path):
    refused(write_jsonl(tmp_path / "p.jsonl", [ROW, ROW | bad]), tiny("gpt2"), "line 2")


def test_a_missing_corrupt_column_is_named(tiny, tmp_path):
    path = write_csv(tmp_path / "p.csv", [ROW])
    refused(path, tiny("gpt2"), "line 2: no column 'corrupted_hard'", corrupt_column="corrupted_hard")


@pytest.mark.parametrize("value", ["x", "", "1.5", "-1", "64"])
def test_a_token_id_that_is_none_is_named(value, tiny, tmp_path):
    row = {"clean": "w0 w1", "corrupted": "w0 w2", "correct_idx": value, "incorrect_idx": "5"}
    refused(write_csv(tmp_path / "p.csv", [row]), tiny("gpt2"), "line 2: correct_idx '?" + value)


@pytest.mark.parametrize("label", ["x", "", "99", "-1", "4.5"])
def test_a_label_that_is_no_year_is_named(label, tiny, tmp_path):
    refused(
        write_csv(tmp_path / "p.csv", [{"clean": "w0", "corrupted": "w1", "label": label}]),
        tiny("gpt2"),
        "line 2: label",
    )


def test_wrong_answers_for_some_pairs_only_are_refused(tiny, tmp_path):
    row = {key: value for key, value in ROW.items() if key != "wrong_answer"}
    refused(write_jsonl(tmp_path / "p.jsonl", [ROW, row]), tiny("gpt2"), "wrong answers for some pairs only")


def test_what_the_model_cannot_say_is_named_with_the_file(tiny, tmp_path):
    path = write_csv(tmp_path / "p.csv", [ROW, ROW | {"clean": "w0 Mary"}])
    refused(path, tiny("gpt2"), "Mary'?: not in the model's vocabulary")
    refused(write_csv(path, [ROW, ROW | {"clean": "w0 w1 w2"}]), tiny("gpt2"), "differ in length on prompts 1")


def test_unusable_rows_are_left_out_on_request(shared_data, gpt2_words):
    """Some nouns of this file are two tokens in the plural only, so not every pair aligns in GPT-2's tokens."""
    path = shared_data / "tasks" / "feature_circuits" / "data" / "simple_test.json"
    with pytest.raises(TaskError, match="differ in length on prompts"):
        PromptPairs.from_jsonl(path, gpt2_words)
    with pytest.warns(UserWarning, match=r"left out \d+ of \d+ pairs; the first: .* differ in length"):
        pairs = PromptPairs.from_jsonl(path, gpt2_words, skip_unusable=True)
    assert len(pairs) > 50
    assert pairs.differs.any(1).all()


def test_a_file_of_unusable_rows_only_is_refused(tmp_path, tiny):
    path = tmp_path / "x.jsonl"
    path.write_text('{"clean": "w0 w1", "corrupt": "w0", "answer": " w1"}\n', encoding="utf-8")
    with pytest.raises(TaskError, match="none of its 1 pairs can be used"):
        PromptPairs.from_jsonl(path, tiny("gpt2"), skip_unusable=True)
