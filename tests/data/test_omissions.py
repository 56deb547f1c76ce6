import pytest

from accessory.data.corpus import build_corpus

GOOD = {"instruction": "q", "output": "ab"}


def make(path, tokenizer, **settings):
    return build_corpus(path, tokenizer, **{"max_words": 4096, **settings})


def test_skipped_records_are_counted_by_cause_with_their_first_lines(write, tokenizer):
    bad = [{"instruction": "q"}] * 5 + [{"instruction": "q", "output": ""}, [1]]
    path = write("x.jsonl", [GOOD, *bad, GOOD])
    corpus = make(path, tokenizer)
    assert len(corpus) == 2
    assert f"skipped 5: has no key 'output', only 'instruction' ({path}:2, {path}:3, {path}:4, ...)" in corpus.report
    assert f"skipped 1: 'output' is empty ({path}:7)" in corpus.report
    assert f"({path}:8)" in corpus.report and corpus.report.startswith("2 documents")


def test_unused_keys_are_named_once_with_counts(write, tokenizer, tmp_path):
    """Only non-empty values in used records count, read from the file or from the cache."""
    records = [
        {**GOOD, "system": "Be brief.", "history": [["a", "b"]], "id": 1},
        {**GOOD, "system": "Be long.", "history": [], "id": 2},
        {**GOOD, "system": "", "history": None, "input": ""},
        {"instruction": "q", "system": "no answer"},
    ]
    path = write("x.jsonl", records)
    for _ in range(2):
        lines = make(path, tokenizer, cache_dir=tmp_path / "cache").report.splitlines()
        assert lines[3:] == [
            f"not used: 'system' of 2 records, from {path}:1 on",
            f"not used: 'history' of 1 records, from {path}:1 on",
            f"not used: 'id' of 2 records, from {path}:1 on",
        ]


@pytest.mark.parametrize(
    ("prompt_type", "unused"),
    [("alpaca", []), ("none", ["'input'"]), ("qg", ["'input'"]), ("shortqa", ["'input'"]),
     ("caption", ["'instruction'", "'input'"])],
)  # fmt: skip
def test_what_a_template_has_no_place_for_is_not_used(write, tokenizer, prompt_type, unused):
    write("x.json", [{**GOOD, "input": "i"}])
    report = make(write("c.yaml", f"META: [{{path: x.json, prompt_type: {prompt_type}}}]"), tokenizer).report
    assert [line.split(" ")[2] for line in report.splitlines() if line.startswith("not used")] == unused


def test_what_a_conversation_holds_beside_its_words_is_not_used(write, tokenizer):
    turns = [{"from": "human", "value": "q", "weight": 1}, {"from": "gpt", "value": "a", "tools": []}] * 2
    path = write("x.json", [{"conversations": turns, "system": "s"}])
    assert make(path, tokenizer, dialog=True).report.splitlines()[2:] == [
        f"not used: 'system' of 1 records, from {path}:1 on",
        f"not used: 'weight' in conversations of 1 records, from {path}:1 on",
    ]
    llava = make(write("c.yaml", "META: [{path: x.json, preprocess: single_turn_llava}]"), tokenizer)
    assert len(llava) == 2 and "'weight' in conversations of 1 records" in llava.report


def test_settings_without_effect_are_named(write, tokenizer, tmp_path):
    write("x.json", [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 8)
    settings = "path: x.json, preprocess: single_turn_llava, prompt_type: none, ratio: 0.5"
    make(write("c.yaml", f"META: [{{{settings}}}]"), tokenizer, dialog=True, cache_dir=tmp_path / "cache")
    path = write("c.yaml", f"META: [{{{settings}, root: r}}]")  # the same documents, by another setting
    report = make(path, tokenizer, dialog=True, cache_dir=tmp_path / "cache").report
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for words in (
        "x.json: root is not used", "x.json: preprocess is not used with --dialog",
        "x.json: prompt_type none is not used: --dialog", "x.json: 4 of 8 records, as ratio 0.5 says",
    ):  # fmt: skip
        assert words in report


def test_how_a_file_was_read_is_said(write, tokenizer):
    report = make(write("x.csv", "instruction,output\nq,a\n"), tokenizer).report
    assert "x.csv: columns separated by commas" in report


def test_a_report_stays_short(write, tokenizer):
    path = write("x.jsonl", [GOOD, *({f"key {i}": 1} for i in range(99))])
    assert "... and 69 more like the last" in make(path, tokenizer).report
