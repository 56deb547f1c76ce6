"""Documents, their labels and what is learned; a corpus that is kept; what tells two apart."""

import io
import multiprocessing
import re

import pytest
import sentencepiece

from accessory.data import tokenizing
from accessory.data.batch import IGNORE
from accessory.data.corpus import build_corpus
from accessory.data.templates import DIALOG_SYSTEM, format_prompt
from accessory.errors import DataError
from accessory.tokenizer import open_tokenizer
from tests.data.corpora import CHAT, DROPPING, GOOD, conversation, ids, make, same


def test_a_document_and_its_shifted_labels(write, tokenizer):
    tokens, labels = make(write("x.json", [GOOD]), tokenizer).document(0)
    prompt = [1, 259, *ids(format_prompt("q"))]
    assert tokens.tolist() == [*prompt, *ids("ab"), 2]
    assert labels.tolist() == [IGNORE] * (len(prompt) - 1) + [*ids("ab"), 2, IGNORE]


def test_without_bos_nothing_opens_the_document(write, bare_tokenizer):
    assert make(write("x.json", [GOOD]), bare_tokenizer).document(0)[0][0] == 259


def test_labels_never_reach_into_the_next_document(write, tokenizer):
    corpus = make(write("x.jsonl", [GOOD, {"instruction": "", "output": "é"}, GOOD]), tokenizer)
    assert len(corpus) == 3
    for index in range(3):
        tokens, labels = corpus.document(index)
        kept = labels[:-1] != IGNORE
        assert labels[-1] == IGNORE and (labels[:-1][kept] == tokens[1:][kept]).all()
        assert corpus.lengths[index] == len(tokens) == len(labels)
        assert corpus.supervised[index] == (labels != IGNORE).sum() > 0


def test_the_first_token_of_a_document_is_nobodys_label(write, bare_tokenizer):
    write("x.json", [{"output": "ab"}])
    corpus = make(write("c.yaml", "META: [{path: x.json, prompt_type: caption}]"), bare_tokenizer)
    assert corpus.supervised[0] == (corpus.document(0)[1] != IGNORE).sum() == len(corpus.tokens) - 1


def test_what_is_cut_loses_its_end_and_is_counted(write, tokenizer):
    whole = make(write("x.json", [{"instruction": "q", "output": "a" * 50}]), tokenizer)
    length = int(whole.lengths[0])
    cut = make(write("x.json", [{"instruction": "q", "output": "a" * 50}]), tokenizer, max_words=length - 1)
    assert cut.lengths.tolist() == [length - 1] and cut.supervised[0] == whole.supervised[0] - 1
    assert (cut.tokens == whole.tokens[:-1]).all() and cut.tokens[-1] != tokenizer.eos_id
    assert (
        "warning: cut short at --max_words: 1 of 1 documents, 1 of them within an answer, whose end is not learned"
        in cut.report
    )
    assert f"; --max_words {length} cuts none" in cut.report and "cut short" not in whole.report


def test_a_prompt_that_leaves_no_room_is_skipped(write, tokenizer):
    prompt = 2 + len(format_prompt("q"))
    path = write("x.json", [GOOD, {"instruction": "q" * 9, "output": "ab"}])
    corpus = make(path, tokenizer, max_words=prompt + 1)
    assert corpus.supervised.tolist() == [1] and f"{path}:1" in corpus.report
    with pytest.raises(DataError, match="prompt fills"):
        make(path, tokenizer, max_words=prompt)


def test_no_usable_record_is_an_error_with_the_causes(write, tokenizer):
    path = write("x.jsonl", [{"instruction": "q"}, {"output": "a"}])
    with pytest.raises(DataError) as caught:
        make(path, tokenizer)
    assert "belle (instruction, output), alpaca (instruction, output), gorilla (code), openai (messages)" in str(
        caught.value
    )
    parts = (
        "only 'instruction'; the nearest shape is alpaca",
        "only 'output'; the nearest shape is alpaca",
    )
    for cause in (f"has no key 'output', {parts[0]} ({path}:1)", f"has no key 'instruction', {parts[1]} ({path}:2)"):
        assert cause in str(caught.value)


def test_only_what_the_assistant_says_is_learned(write, tokenizer):
    turns = [
        {"from": who, "value": words} for who, words in [("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")]
    ]
    corpus = make(write("x.json", [{"conversations": turns}]), tokenizer, dialog=True)
    tokens, labels = corpus.document(0)
    assert tokenizer.decode(tokens.tolist()).startswith(DIALOG_SYSTEM)
    assert labels[labels != IGNORE].tolist() == [*ids(" a\n###"), *ids(" b\n###"), 2]


def test_a_sample_shows_what_is_learned(write, tokenizer):
    shown = make(write("x.json", [GOOD]), tokenizer).show(0)
    assert shown.endswith("### Response:«ab<end>»") and shown.count("«") == 1


def test_ratio_takes_the_same_share_every_time(write, tokenizer):
    write("x.json", [{"instruction": f"{i}", "output": "a"} for i in range(100)])
    quarter, again = (make(write("c.yaml", "META: [{path: x.json, ratio: 0.25}]"), tokenizer) for _ in range(2))
    assert len(quarter) == 25 and same(quarter, again)
    numbers = [int(quarter.show(i).split("### Instruction:\n")[1].split("\n")[0]) for i in range(25)]
    assert numbers == sorted(set(numbers)) and numbers != list(range(25))


def test_two_entries_of_one_file_stay_apart(write, tokenizer):
    write("x.json", [GOOD])
    corpus = make(write("c.yaml", "META: [{path: x.json}, {path: x.json, prompt_type: none}]"), tokenizer)
    assert corpus.origins[:, 0].tolist() == [0, 1] and corpus.documents_by_prompt_layout() == {"alpaca": 1, "none": 1}


def test_lengths_are_compared_with_what_a_model_reads(write, tokenizer):
    """After --max_words has cut documents; of several longest ones the first is named."""
    path = write("x.jsonl", [{"instruction": "q", "output": "a" * size} for size in (3, 60, 50, 60)])
    corpus = make(path, tokenizer)
    longest, middle = int(corpus.lengths.max()), int(corpus.lengths[2])
    assert corpus.check_lengths(None, None) == corpus.check_lengths(longest, longest) == []
    found = rf"1 \({path}:2\) has {longest}\. "
    with pytest.raises(
        DataError, match=rf"^3 of 4 documents have more than {middle - 1} tokens; document {found}.*no pos"
    ):
        corpus.check_lengths(middle - 1, None)
    for positions in (None, longest):
        (note,) = corpus.check_lengths(positions, middle)
        assert re.match(rf"2 of 4 documents .* {found}.*; --max_words {middle} cuts them", note)
    assert make(path, tokenizer, max_words=middle).check_lengths(middle, middle) == []


def test_threads_and_place_change_nothing(write, tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    one = make(write("x.json", [GOOD] * 9), tokenizer)
    assert same(one, make(write("sub/y.json", [GOOD] * 9), tokenizer, threads=4))


def test_fingerprint_tells_apart_what_makes_other_documents(write, tokenizer, other_tokenizer):
    write("x.json", [GOOD])
    prints = [make(write("x.json", [GOOD]), tokenizer).fingerprint]
    prints += [make(write("x.json", [GOOD, GOOD]), tokenizer).fingerprint]
    prints += [make(write("x.json", [GOOD]), other_tokenizer).fingerprint]
    prints += [make(write("x.json", [GOOD]), tokenizer, max_words=999).fingerprint]
    prints += [make(write("c.yaml", "META: [{path: x.json, prompt_type: none}]"), tokenizer).fingerprint]
    assert len(set(prints)) == len(prints)


def test_the_cache_gives_back_the_same_without_tokenizing(write, tokenizer, tmp_path):
    path, cache = write("x.jsonl", [GOOD, {"instruction": "q"}]), tmp_path / "deep/cache"
    built = make(path, tokenizer, cache_dir=cache)
    calls = tokenizer.calls
    kept = make(path, tokenizer, cache_dir=cache)
    assert tokenizer.calls == calls > 0
    assert same(built, kept) and kept.report == built.report and kept.show(0) == built.show(0)
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def _build_in_process(arguments):
    path, tokenizer, cache = arguments
    return build_corpus(path, tokenizer, max_words=4096, cache_dir=cache).tokens.tolist()


def test_processes_may_build_at_once(write, tokenizer, tmp_path):
    path = write("x.json", [GOOD] * 500)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_build_in_process, [(path, tokenizer, tmp_path / "cache")] * 8, chunksize=1)
    assert found == [make(path, tokenizer).tokens.tolist()] * 8
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_torn_cache_is_made_again(write, tokenizer, tmp_path):
    path, cache = write("x.json", [GOOD]), tmp_path / "cache"
    built = make(path, tokenizer, cache_dir=cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert same(built, make(path, tokenizer, cache_dir=cache))


def test_a_cache_is_mapped_and_others_may_read_it(write, tokenizer, tmp_path):
    path, cache = write("x.json", [GOOD] * 2000), tmp_path / "cache"
    make(path, tokenizer, cache_dir=cache)
    (file,) = cache.iterdir()
    kept = make(path, tokenizer, cache_dir=cache)
    assert file.stat().st_mode & 0o044
    with open("/proc/self/maps") as maps:
        assert len(kept) and any(str(file) in line for line in maps)


def test_a_missing_data_file_is_a_data_error(tokenizer, tmp_path):
    with pytest.raises(DataError, match="absent"):
        make(tmp_path / "absent.json", tokenizer)


def test_an_unpaired_surrogate_costs_one_record(write, tokenizer):
    path = write("x.json", [{"instruction": "q", "output": "\ud800"}, GOOD])
    assert len(make(path, tokenizer)) == 1


def test_an_answer_without_prompt_continues_nothing(write, tokenizer):
    write("x.json", [{"output": "ab"}])
    corpus = make(write("c.yaml", "META: [{path: x.json, prompt_type: caption}]"), tokenizer)
    assert corpus.tokens[1:3].tolist() == tokenizer.encode("ab")[:2]
    assert corpus.supervised[0] == len(tokenizer.encode("ab")) + 1


def test_a_ratio_of_nothing_is_nothing(write, tokenizer):
    write("x.json", [])
    write("y.json", [GOOD])
    path = write("c.yaml", "META: [{path: x.json, ratio: 0.5}, {path: y.json, ratio: 0.1}]")
    corpus = make(path, tokenizer)
    assert len(corpus) == 1 and "x.json: holds no records" in corpus.report


def test_the_cache_of_one_format_does_not_serve_another(write, tokenizer, tmp_path):
    line = '[{"instruction": "q", "output": "ab"}]'
    make(write("x.json", line), tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="the columns are"):
        make(write("x.tsv", line), tokenizer, cache_dir=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(write, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"plain.*cannot be kept"):
        make(write("x.json", [GOOD]), tokenizer, cache_dir=write("plain", "a file") / "cache")


def test_with_sentencepiece_a_sample_shows_every_space(write, tmp_path):
    model = io.BytesIO()
    sentences = [format_prompt("Name a colour."), "red and green are colours"] * 20
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **settings)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = open_tokenizer(tmp_path)
    corpus = make(write("x.json", [{"instruction": "Name a colour.", "output": " red 🙂"}]), tokenizer)
    assert corpus.show(0) == f"{format_prompt('Name a colour.')}« red 🙂<end>»"
    answer = tokenizer.encode(" red 🙂", continuation=True)
    tokens, labels = corpus.document(0)
    prompt = [1, *tokenizer.encode(format_prompt("Name a colour."))]
    assert tokens.tolist() == [*prompt, *answer, 2]
    assert labels[labels != IGNORE].tolist() == [*answer, 2]


def test_no_record_is_lost_between_the_chunks_that_are_tokenized_together(write, tokenizer):
    records = [{"instruction": "q", "output": f"{i:05}"} for i in range(9000)]
    path = write("x.jsonl", [*records[:5000], {"output": "no question"}, *records[5000:]])
    config = write("c.yaml", f"META: [{{path: {path.name}, prompt_type: none}}]")
    corpus = make(config, tokenizer)
    assert [tokenizer.decode(corpus.document(i)[0].tolist()) for i in range(9000)] == [f"q{i:05}" for i in range(9000)]


def test_what_is_told_is_kept_in_the_cache(write, chat_tokenizer, tmp_path):
    """Another chat template lays the records out anew."""
    path, cache = write("x.json", [conversation(("human", "a"), ("gpt", "red"))]), tmp_path / "cache"
    made, kept = (make(path, chat_tokenizer(), cache_dir=cache) for _ in range(2))
    assert same(made, kept) and made.told == kept.told and made.report == kept.report
    other = make(path, chat_tokenizer("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"), cache_dir=cache)
    assert other.show(0) == "a«red<end>»" and other.fingerprint != made.fingerprint


def test_an_earlier_versions_identity_stays(write, tokenizer, chat_tokenizer):
    """Runs of it can be resumed: nothing of what was told stands there, unless other documents are made of it."""
    plain = [("human", "a"), ("gpt", "red"), ("human", "b"), ("gpt", "green")]
    for records, dialog, told in (
        ([GOOD], False, {}),
        ([conversation(*plain)], True, {}),
        ([conversation(*plain[1:])], True, {"shape": "sharegpt", "layout": "dialog"}),
        ([conversation(*plain)], False, {"shape": "sharegpt", "layout": "dialog"}),
        ([GOOD], True, {"shape": "alpaca", "layout": "dialog"}),
    ):
        (entry,) = make(write("x.json", records), tokenizer, dialog=dialog).identity["META"]
        assert {name: entry[name] for name in ("shape", "layout") if name in entry} == told
        assert not {"mask_history", "train_on_source"} & entry.keys()
    named = make(write("c.yaml", "META: [{path: x.json, shape: alpaca}]"), tokenizer)
    assert named.fingerprint == make(write("x.json", [GOOD]), tokenizer).fingerprint
    chats = make(write("x.json", [conversation(*plain)]), chat_tokenizer()).identity
    assert chats["chat_template"] and chats["META"][0]["layout"] == "chat"


def test_each_side_is_cut_by_itself(write, tokenizer):
    """BOS counts for the source, and EOS for the target; what is cut is counted."""
    write("x.json", [{"input": "abcdef", "output": "xyz"}, {"input": "a", "output": "x"}])
    path = write("c.yaml", "META: [{path: x.json}]")
    corpus = make(tokenizer=tokenizer, path=path, source_max_len=4, target_max_len=3)
    assert [corpus.document(i)[0].tolist() for i in (0, 1)] == [
        [1, 259, *ids("ab"), *ids("xyz")],
        [1, 259, *ids("a"), *ids("x"), 2],
    ]
    for flag, lost, longest in (
        ("source_max_len", "whose questions lose their ends", 8),
        ("target_max_len", "the ends of whose answers are not learned", 4),
    ):
        assert (
            f"warning: cut short at --{flag}: 1 of 2 documents, {lost}; --{flag} {longest} cuts none" in corpus.report
        )
        limits = {"source_max_len": 4, "target_max_len": 3} | {flag: longest}
        assert f"cut short at --{flag}" not in make(tokenizer=tokenizer, path=path, **limits).report
    whole = make(tmp := write("x.json", [{"input": "abcdef", "output": "xyz"}]), tokenizer)
    assert whole.fingerprint != make(tmp, tokenizer, source_max_len=99).fingerprint


def test_sources_are_learned_where_that_is_asked_for(write, tokenizer):
    path = write("x.json", [{"input": "ab", "output": "xy"}, {"input": "cd", "output": "z"}])
    corpus = make(path, tokenizer, train_on_source=True)
    assert [corpus.show(i) for i in (0, 1)] == ["«abxy<end>»", "«cdz<end>»"]
    one = make(write("c.yaml", "META: [{path: x.json, train_on_source: true}]"), tokenizer)
    assert same(one, corpus) and one.fingerprint != make(path, tokenizer).fingerprint


def test_only_last_answers_are_learned_where_that_is_asked_for(write, chat_tokenizer):
    turns = [("human", "a"), ("gpt", "red"), ("human", "b"), ("gpt", "green")]
    path, tokenizer = write("x.json", [conversation(*turns)]), chat_tokenizer()
    corpus = make(path, tokenizer, mask_history=True)
    assert corpus.show(0) == "user\na\nassistant\nred\nuser\nb\nassistant\n«green<end>»"
    one = make(write("c.yaml", "META: [{path: x.json, mask_history: true}]"), tokenizer)
    assert same(one, corpus) and one.fingerprint != make(path, tokenizer).fingerprint
    dropping = make(path, chat_tokenizer(DROPPING), mask_history=True)
    assert len(dropping) == 1 and dropping.show(0).endswith("«green<end>»")


def test_fingerprint_tells_chat_templates_apart_where_one_is_used(write, chat_tokenizer):
    write("x.json", [GOOD])
    for config, count in ((CHAT, 2), (CHAT.replace("chat", "none"), 1)):
        path = write("c.yaml", config)
        templates = ["{% for m in messages %}%s{{ m.content }}<|im_end|>{% endfor %}".replace("%s", x) for x in "ab"]
        assert len({make(path, chat_tokenizer(template)).fingerprint for template in templates}) == count


def test_long_texts_are_tokenized_few_at_a_time(write, tokenizer, monkeypatch):
    path = write("x.jsonl", [{"instruction": "q", "output": str(i) * 200} for i in range(9)])
    together = make(path, tokenizer)
    monkeypatch.setattr(tokenizing, "_CHARACTERS", 700)
    before = tokenizer.calls
    assert same(make(path, tokenizer), together) and tokenizer.calls - before == 6


def test_several_questions_of_a_record_are_told_apart_from_the_first_alone(write, tokenizer):
    """Which is what earlier versions made of them, and kept."""
    turns = [("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")]
    path = write("c.yaml", "META: [{path: x.json, preprocess: single_turn_llava}]")
    write("x.json", [conversation(*turns[:2])])
    assert "shape" not in make(path, tokenizer).identity["META"][0]
    write("x.json", [conversation(*turns)])
    corpus = make(path, tokenizer)
    assert len(corpus) == 2 and corpus.identity["META"][0]["shape"] == "sharegpt"
