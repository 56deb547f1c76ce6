"""Records with images: from an alpaca record, a conversation or a caption to tokens, labels and a picture."""

import pytest
import torch

from accessory.data.batch import IGNORE, PackedBatch
from accessory.data.corpus import build_corpus
from accessory.data.held_out import held_out, in_common
from accessory.data.order import GlobalOrder
from accessory.data.templates import format_prompt
from accessory.errors import DataError

pytest.importorskip("PIL", reason="images are read by Pillow")

from accessory.data.pictures import CROPPED, PicturePlace, draw_of
from tests.data.corpora import GOOD, conversation, ids, same
from tests.data.images import noise, save

BEHIND, BEFORE, APART = PicturePlace(4, 8), PicturePlace(5, 8, before_start=True), PicturePlace(0, 8)
SEEN = GOOD | {"image": "a.png"}
LLAVA = conversation(("human", "<image>\nq"), ("gpt", "ab")) | {"image": "a.png"}


@pytest.fixture
def make(write, tokenizer, tmp_path):
    """The corpus of records beside two images; of a YAML of one entry, if settings are given."""

    def build(records, place=BEHIND, entry="", **settings):
        for name in ("a.png", "b.png"):
            (tmp_path / name).is_file() or save(tmp_path / name)
        write("x.json", records)
        path = write("c.yaml", f"META: [{{path: x.json, {entry}}}]") if entry else tmp_path / "x.json"
        return build_corpus(path, tokenizer, pictures=place, **{"max_words": 4096, **settings})

    return build


def test_rows_stand_behind_bos_or_before_it(make, tokenizer, tmp_path):
    prompt = ids(format_prompt("q"))
    plain = [1, 259, *prompt, *ids("ab"), 2]
    for place, expected in ((BEHIND, [1, *[0] * 4, *plain[1:]]), (BEFORE, [*[0] * 5, *plain]), (APART, plain)):
        corpus = make([SEEN, GOOD], place)
        tokens, labels = corpus.document(0)
        assert tokens.tolist() == expected and corpus.document(1)[0].tolist() == plain
        assert labels[labels != IGNORE].tolist() == [*ids("ab"), 2] and labels[-4:-1].tolist() == [*ids("ab"), 2]
        (inset,) = corpus.insets(0)
        assert (inset.start, inset.rows) == (1 if place is BEHIND else 0, place.rows) and not corpus.insets(1)
        assert inset.content.file == tmp_path / "a.png" and inset.content.size == 8
        assert corpus.lengths.tolist() == [len(expected), len(plain)] and corpus.supervised.tolist() == [3, 3]


def test_without_a_vision_part_nothing_changes(make, write, tokenizer):
    """The fingerprint is that of the version before images."""
    corpus = make([SEEN, GOOD], None, entry="root: images")
    assert len(corpus) == 1 and "'image', which the model does not take" in corpus.report
    assert "root is not used: the model takes no images" in corpus.report and corpus.pictures is None
    assert corpus.fingerprint == "f618b04ae4091636ffb215ff1df2d6a28b8521b55ed9ccba29293a6612db0862"


def test_what_is_said_loses_the_mark_of_the_image(make, tokenizer):
    for record, more in ((LLAVA, {"dialog": True}), (LLAVA, {"entry": "preprocess: single_turn_llava"}), (SEEN, {})):
        shown = make([record], **more).show(0)
        assert shown.startswith("<image: a.png>") and shown.count("<image") == 1
        assert "q" in shown and "\nq\n\n### R" not in shown.replace("Instruction:\nq", "")
    several = conversation(("human", "<image>\nq"), ("gpt", "a"), ("human", "r <image>"), ("gpt", "b")) | {
        "image": "a.png"
    }
    assert (
        make([several], dialog=True)
        .show(0)
        .endswith("### Human: q\n### Assistant:« a\n###» Human: r\n### Assistant:« b\n###<end>»")
    )
    each = make([several], entry="preprocess: single_turn_llava")
    assert [each.image_name(i) for i in range(2)] == ["a.png"] * 2 and each.show(1).count("<image") == 1
    report = make([GOOD, SEEN | {"output": " <image> "}]).report
    assert "skipped 1: an answer holds <image> and nothing else" in report
    assert "<image>" in make([GOOD | {"instruction": "What is <image>?"}]).show(0)  # of a record without an image


def test_captions_are_learned_from_their_first_word_on(make, bare_tokenizer):
    records = [{"url": "a.png", "caption": "xy"}, {"image": "b.png", "caption": ["uv"], "id": 7}, {"output": "w"}]
    for place, start in ((BEHIND, 1), (BEFORE, 0)):
        corpus = make(records, place, entry="preprocess: caption")
        labels = corpus.document(0)[1]
        text = [259, *ids("xy"), 2]
        first = 1 + place.rows - 1  # behind which the caption stands: the picture's last row, or BOS
        assert labels[first : first + 4].tolist() == text and (labels[:first] == IGNORE).all()
        assert [*map(corpus.image_name, range(3))] == ["a.png", "b.png", None]
        assert corpus.insets(0)[0].start == start and "not used: 'id'" in corpus.report
        assert corpus.supervised.tolist() == [(corpus.document(i)[1] != IGNORE).sum() for i in range(3)] == [4, 4, 3]


def test_without_bos_a_picture_predicts_the_first_word(write, bare_tokenizer, tmp_path):
    save(tmp_path / "a.png")
    write("x.json", [{"image": "a.png", "output": "xy"}, {"output": "xy"}])
    path = write("c.yaml", "META: [{path: x.json, prompt_type: caption}]")
    corpus = build_corpus(path, bare_tokenizer, max_words=99, pictures=BEHIND)
    text = [259, *ids("xy"), 2]
    assert corpus.document(0)[1].tolist() == [IGNORE] * 3 + [*text, IGNORE]
    assert corpus.supervised.tolist() == corpus.labelable.tolist() == [4, 3]


def test_one_of_several_captions_is_the_same_in_each_run(make):
    records = [{"url": "a.png", "caption": [str(n), *"abcd"]} for n in range(40)]
    one, other = (make(records, entry="preprocess: caption") for _ in range(2))
    shown = [one.show(index) for index in range(40)]
    assert same(one, other) and shown == [other.show(index) for index in range(40)] and len({*shown}) > 4


def test_the_most_tokens_count_the_rows_and_never_cut_them(make):
    whole = make([SEEN | {"output": "a" * 50}])
    length = int(whole.lengths[0])
    cut = make([SEEN | {"output": "a" * 50}, GOOD], max_words=length - 1)
    assert cut.lengths[0] == length - 1 and cut.document(0)[0].tolist() == whole.document(0)[0][:-1].tolist()
    assert (
        f"1 of 2 documents, 1 of them within an answer, whose end is not learned; --max_words {length} cuts"
        in cut.report
    )
    prompt = 2 + len(format_prompt("q"))
    small = make([SEEN, GOOD], max_words=prompt + 4)
    assert len(small) == 1 and "its picture and prompt fill all" in small.report
    assert len(make([SEEN, GOOD], max_words=prompt + 5)) == 2
    for most in (4, 3, 1):
        with pytest.raises(DataError, match="fill"):
            make([SEEN], max_words=most)
    assert make([SEEN], source_max_len=30).lengths[0] == 30 + 4 + 3


def test_chat_templates_have_pictures_too(make, write, chat_tokenizer, tmp_path):
    save(tmp_path / "a.png")
    path = write("x.json", [LLAVA])
    corpus = build_corpus(path, chat_tokenizer(), max_words=512, pictures=BEHIND)
    assert corpus.insets(0)[0].start == 0 and corpus.document(0)[0][:4].tolist() == [0] * 4
    assert corpus.show(0) == "<image: a.png>" + build_corpus(
        write("y.json", [conversation(("human", "q"), ("gpt", "ab"))]), chat_tokenizer(), max_words=512
    ).show(0)


def test_learning_questions_too_leaves_the_rows_out(make):
    for place in (BEHIND, BEFORE):
        corpus = make([SEEN], place, train_on_source=True)
        tokens, labels = corpus.document(0)
        words = len(tokens) - place.rows
        assert corpus.supervised[0] == (labels != IGNORE).sum() == words - 1 == corpus.labelable[0]
        assert labels[labels != IGNORE].tolist() == corpus.tokens[1:].tolist()


def test_weights_of_prompts_leave_the_rows_out(make):
    for place in (BEHIND, BEFORE, APART):
        corpus = make([SEEN, GOOD, SEEN | {"image": "b.png"}], place)
        order = GlobalOrder(corpus, batch_size=3, accum_iter=1, prompt_weight=0.25, share_prefixes=False)
        (batch,) = order.micro_batches(0, 0)
        assert float(batch.weights.sum()) == order.loss_weight(0, 0)
        predicted = batch.labels[batch.labels >= 0].tolist()
        assert 0 not in predicted and 1 not in predicted  # neither a row nor BOS
        assert len(predicted) == corpus.labelable.sum() == len(corpus.tokens) - 3


def test_roots(make, write, tokenizer, tmp_path):
    """`root` is looked for as `path` is; a path may be absolute, and links and `..` may stay within."""
    save(tmp_path / "pictures/deep/c.png")
    (tmp_path / "pictures/link.png").symlink_to("deep/c.png")
    (tmp_path / "linked").symlink_to("pictures")
    names = ["deep/c.png", "link.png", "deep/../deep/c.png", str(tmp_path / "pictures/deep/c.png")]
    for root in ("pictures", str(tmp_path / "pictures"), "linked"):
        corpus = make([SEEN | {"image": name} for name in names], entry=f"root: {root}")
        assert [corpus.image_name(i) for i in range(4)] == names and "skipped" not in corpus.report
        assert corpus.insets(0)[0].content.pixels().shape == (3, 8, 8)
    with pytest.raises(DataError, match=r"^root 'picture' of .*x\.json is no directory, looked for beside"):
        make([SEEN], entry="root: picture")
    with pytest.raises(DataError, match="is not there"):
        make([SEEN], entry="root: pictures")


def test_a_list_of_one_image(make):
    corpus = make([GOOD | {"images": ["a.png"]}, GOOD | {"images": ["a.png"] * 2}, SEEN | {"images": ["a.png"]}])
    assert len(corpus) == 1 and corpus.image_name(0) == "a.png"
    assert "skipped 1: 'images' holds several, and a document takes one" in corpus.report
    assert "skipped 1: has 'images', which the model does not take" in corpus.report


def test_columns_may_name_the_image(make):
    records = [{"q": "a?", "a": "b", "files": ["a.png"]}]
    corpus = make(records, entry="columns: {instruction: q, output: a, image: files.0}")
    assert corpus.image_name(0) == "a.png"


def test_what_tells_two_corpora_apart(make, tmp_path):
    prints = [
        make([SEEN | {"image": name}], place).fingerprint for name in ("a.png", "b.png") for place in (BEHIND, BEFORE)
    ]
    prints += [make([SEEN], image_transform="padded_resize").fingerprint, make([SEEN, GOOD], None).fingerprint]
    whole = make([SEEN, SEEN | {"image": "c.png"}])
    save(tmp_path / "c.png")
    prints += [whole.fingerprint, make([SEEN, SEEN | {"image": "c.png"}]).fingerprint]
    assert len(set(prints)) == len(prints)
    save(tmp_path / "c.png", noise(9, 9))  # another image under the same name does not
    assert make([SEEN, SEEN | {"image": "c.png"}]).fingerprint == prints[-1]


def test_the_cache_knows_the_images(make, tokenizer, tmp_path):
    records = [SEEN, GOOD, SEEN | {"image": "b.png"}, SEEN | {"image": "none.png"}]
    built = make(records, cache_dir=tmp_path / "cache")
    calls = tokenizer.calls
    kept = make(records, cache_dir=tmp_path / "cache")
    assert tokenizer.calls == calls and same(built, kept) and kept.report == built.report
    assert "skipped 1: its image is not there, such as 'none.png' (" in kept.report
    assert [kept.insets(i) != () for i in range(3)] == [True, False, True]
    assert kept.insets(2)[0].content == built.insets(2)[0].content and kept.show(2) == built.show(2)
    save(tmp_path / "none.png")
    assert len(make(records, cache_dir=tmp_path / "cache")) == 4  # what was not there is now
    (tmp_path / "none.png").unlink()
    assert len(make(records, cache_dir=tmp_path / "cache")) == 3


def test_equal_words_about_other_images_are_other_records(make):
    one = make([SEEN, GOOD])
    assert in_common(make([SEEN | {"image": "b.png"}, GOOD]), one) == 1 and in_common(make([SEEN, GOOD]), one) == 2
    held = held_out(make([SEEN, SEEN | {"image": "b.png"}, SEEN, GOOD]), 0.5)
    assert held[0] == held[2]


def test_documents_share_one_picture_and_never_two(make):
    question = {"instruction": "q" * 40}
    records = [SEEN | question | {"image": image, "output": output} for image in ("a.png", "b.png") for output in "xy"]
    for place in (BEHIND, BEFORE):
        corpus = make([*records, GOOD | question], place, image_transform="padded_resize")
        batch = PackedBatch.pack([(*corpus.document(i), i, corpus.insets(i)) for i in range(5)])
        files = [inset.content.file.name for inset in batch.insets]
        assert sorted(files) == ["a.png", "b.png"] and sum(batch.shared) > 2 * 40
        rows = [place for inset in batch.insets for place in range(inset.start, inset.start + inset.rows)]
        assert rows == (batch.tokens == 0).nonzero()[:, 0].tolist()  # there is no other token 0
    corpus = make([{"image": "a.png", "output": word} for word in ("xy", "zw")], BEHIND, entry="prompt_type: caption")
    batch = PackedBatch.pack([(*corpus.document(i), i, corpus.insets(i)) for i in range(2)])
    assert len(batch.insets) == 2 and max(batch.shared) <= 1  # the last row has a label: nothing of it is shared
    corpus = make(records[:2], APART)
    batch = PackedBatch.pack([(*corpus.document(i), i, corpus.insets(i)) for i in range(2)])
    assert not any(batch.shared) and [inset.start for inset in batch.insets] == [0, batch.lengths[0]]


def test_crops_are_the_same_on_any_number_of_ranks_and_after_a_resume(make):
    corpus = make([SEEN | {"instruction": str(i), "image": "ab"[i % 2] + ".png"} for i in range(8)])

    def pictures(epoch, step, ranks=1, **more):
        orders = [
            GlobalOrder(corpus, batch_size=4 // ranks, accum_iter=1, dp_rank=rank, dp_size=ranks, seed=3, **more)
            for rank in range(ranks)
        ]
        batches = [batch for order in orders for batch in order.micro_batches(epoch, step)]
        assert all(len(batch.insets) == len(batch.sample_ids) for batch in batches)
        return {i: inset.content for b in batches for i, inset in zip(b.sample_ids, b.insets, strict=True)}

    first = pictures(0, 0) | pictures(0, 1)
    assert (
        first
        == pictures(0, 0, ranks=2) | pictures(0, 1, ranks=2)
        == pictures(0, 1, threads=2) | pictures(0, 0, threads=2)
    )
    assert {i: picture.draw for i, picture in first.items()} == {i: draw_of(3, 0, i) for i in range(8)}
    second = pictures(1, 0) | pictures(1, 1)
    assert not {picture.draw for picture in first.values()} & {picture.draw for picture in second.values()}
    assert {picture.transform for picture in first.values()} == {CROPPED}
    assert {p.transform for p in pictures(0, 0, trains=False, share_prefixes=False).values()} == {"resized_center_crop"}


def test_images_of_the_next_step_are_read_before_it_begins(make, tmp_path):
    records = [SEEN | {"image": name} for name in ("a.png", "b.png", "a.png", "b.png")]
    corpus = make(records, image_transform="padded_resize")

    def pixels(order, step):
        return [inset.content.pixels() for batch in order.micro_batches(0, step) for inset in batch.insets]

    waiting, ahead = (GlobalOrder(corpus, batch_size=1, accum_iter=2, shuffle=False, threads=n) for n in (0, 2))
    expected = [pixels(waiting, step) for step in (0, 1)]
    first = pixels(ahead, 0)
    ahead._readers.shutdown()  # nothing is begun from here on
    for name in "ab":
        (tmp_path / f"{name}.png").unlink()
    second = [inset.content.pixels() for batch in ahead._next[1] for inset in batch.insets]
    assert all(torch.equal(*pair) for pair in zip(first + second, [*expected[0], *expected[1]], strict=True))
    with pytest.raises(DataError, match=r"^document 0 \(.*x\.json:1 record 1\): the image '.*a\.png' is not there"):
        pixels(waiting, 0)


def test_an_evaluation_reads_no_more_than_the_next_micro_batch(make):
    corpus = make([SEEN] * 4)
    order = GlobalOrder(corpus, batch_size=4, accum_iter=1, max_tokens=int(corpus.lengths[0]), threads=1, trains=False)
    begun = []
    order._begun = lambda batch: begun.append(batch) or batch
    batches = order.micro_batches(0, 0)
    seen = [(next(batches), len(begun))[1] for _ in range(4)]
    assert seen == [2, 3, 4, 4] and not [*batches] and order._next is None
