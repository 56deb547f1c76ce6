"""Prompts with images, against transformers that is given the same embeddings."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accessory.conversation import Conversation
from accessory.data.pictures import TRANSFORMS, Picture, PicturePlace
from accessory.errors import ConfigError, DataError
from accessory.meta import MetaModel
from accessory.meta.images import encoded, picture_of
from tests.meta.byte_models import BOS, EOS

pillow = pytest.importorskip("PIL.Image", reason="images need Pillow")
ROWS = 5
BEHIND, BEFORE = (PicturePlace(rows=ROWS, size=8, before_start=before) for before in (False, True))


class Eye:
    """Rows from the mean of a picture's pixels, and how many pictures it was given."""

    def __init__(self, scale: float) -> None:
        self.seen = 0
        self.weight = torch.randn(3, ROWS * 64, generator=torch.Generator().manual_seed(1)) * scale

    def __call__(self, pictures: list[Picture]) -> list[torch.Tensor]:
        """[ROWS, 64] each."""
        self.seen += len(pictures)
        return [(picture.pixels().mean((1, 2)) @ self.weight).view(ROWS, 64) for picture in pictures]


@pytest.fixture
def pair(checkpoint, tmp_path: Path) -> tuple:
    """A model of transformers, and ours with an encoder."""
    theirs, ours = checkpoint(), MetaModel.from_pretrained(tmp_path, dtype="fp32")
    ours.vision, ours.encoder = SimpleNamespace(place=BEHIND), Eye(theirs.get_input_embeddings().weight.std())
    return theirs, ours


@pytest.fixture
def images() -> list:
    """The same red picture as an image, as bytes, and a blue one."""
    red, blue = (pillow.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    held = io.BytesIO()
    red.save(held, "PNG")
    return [red, held.getvalue(), blue]


def embedded(theirs, ours: MetaModel, prompt: str, picture: Picture | None) -> torch.Tensor:
    """[1, T, D] of a prompt as it should be laid out, written out here."""
    table = theirs.get_input_embeddings().weight
    ids = [BOS, *ours.tokenizer.encode(prompt)]
    if picture is None:
        return table[ids][None]
    rows = ours.encoder([picture])[0]
    before = ours.vision.place.before_start
    return torch.cat([rows, table[ids]] if before else [table[ids[:1]], rows, table[ids[1:]]])[None]


@torch.no_grad()
@pytest.mark.parametrize("place", [BEHIND, BEFORE])
def test_answers_equal_transformers(pair, images: list, place: PicturePlace, tmp_path: Path) -> None:
    """With and without images in one batch, streamed, several to one prompt; from a path, bytes and an image."""
    theirs, ours = pair
    ours.vision.place = place
    (tmp_path / "red.png").write_bytes(images[1])
    prompts = ["What is seen?", "What is seen?", "Hello", "What is seen?"]
    given = [images[0], images[2], None, tmp_path / "red.png"]
    pictures = [ours.picture(image) for image in given]
    wanted, stops = [], sorted(ours.tokenizer.stop_ids)
    for prompt, picture in zip(prompts, pictures, strict=True):
        x = embedded(theirs, ours, prompt, picture)
        found = theirs.generate(
            inputs_embeds=x, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=EOS
        )
        wanted.append(ours.tokenizer.decode([token for token in found[0].tolist() if token not in stops]))
    assert wanted[0] == wanted[3] and len(set(wanted)) == 3
    assert ours.generate(prompts, given, max_gen_len=12) == wanted
    assert ours.generate(prompts[0], images[1], max_gen_len=12) == wanted[0]
    assert list(ours.stream_generate(prompts[1], images[2], max_gen_len=12))[-1] == wanted[1]
    ours.encoder.seen = 0
    assert ours.answers(prompts[1], 3, images[2], max_gen_len=12) == [wanted[1]] * 3
    assert ours.encoder.seen == 1
    logits = ours.compute_logits(prompts[:3], given[:3])
    found = ours.evaluate_examples(prompts[:3], ["What", "What", "Hel"], given[:3])
    for number in range(3):
        x = embedded(theirs, ours, prompts[number], pictures[number])
        expected = theirs(inputs_embeds=x).logits[0]
        tokens = torch.tensor([BOS, *ours.tokenizer.encode(prompts[number])])
        if number < 2:
            expected = expected[ROWS:]
        torch.testing.assert_close(logits[number], expected, rtol=1e-4, atol=1e-4)
        known = 1 + (3 if number == 2 else 4)
        log_p = expected.log_softmax(-1)[known - 1 : -1].gather(1, tokens[known:, None]).sum().item()
        assert found["log_likelihood"][number] == pytest.approx(log_p, rel=1e-4)


def test_an_image_is_never_cut(pair, images: list) -> None:
    """Start and image stay, the end of the text too; where not even a token fits behind them, that is said."""
    _, ours = pair
    picture = ours.picture(images[0])
    ours.max_seq_len = 10
    with pytest.warns(UserWarning, match="The first 5 tokens of a prompt are left out: max_seq_len is 10"):
        ids = ours.prompt_tokens("abcdefgh", picture)
    assert ids[0] == BOS and len(set(ids[1:6])) == 1 and ids[1] < 0 and ids[6:] == ours.tokenizer.encode("fgh")
    ours.max_seq_len = 7
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ConfigError, match="A prompt has 7 tokens"):
        ours.generate("abcdefgh", picture)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_kept_of_an_image_has_its_pixels(transform: str) -> None:
    """Grey steps that no resizing repeats, wider than high; a picture turned by its EXIF comes upright."""
    image = pillow.linear_gradient("L").resize((90, 50)).convert("RGB")
    held = io.BytesIO()
    image.save(held, "JPEG", exif=_turned(image))
    picture = Picture(held.getvalue(), transform, 33, draw=4)
    again = picture.reduced().reduced()
    assert torch.equal(again.pixels(), picture.pixels()) and again == picture.reduced()
    held = pillow.open(held)
    assert torch.equal(picture_of(held, "padded_resize", PicturePlace(3, 33)).pixels(),
                       Picture(encoded(held), "padded_resize", 33).pixels())  # fmt: skip
    assert pillow.open(io.BytesIO(encoded(held))).size == (50, 90)


def _turned(image) -> bytes:
    exif = image.getexif()
    exif[0x0112] = 6
    return exif.tobytes()


def test_what_is_no_image(pair, images: list) -> None:
    """Each is named; a model of text alone says what to load."""
    _, ours = pair
    for wrong, said in (
        (torch.zeros(3, 8, 8), r"an image is a Tensor: expected a path, the bytes of a file, or an image of Pillow"),
        ([images[0]] * 2, "images are 2, and prompts 1"),
        (images[1][:50], "the image is damaged|the image breaks off"),
        ("no.png", r"the image 'no.png' is not there"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            ours.generate("q", wrong)
    with pytest.raises(ConfigError, match=r"'padded_resise'.*Did you mean 'padded_resize'"):
        ours.generate("q", images[0], image_transform="padded_resise")
    ours.vision = None
    with pytest.raises(ConfigError, match=r"this model has no image encoder. Load one that .*llama_qformerv2"):
        ours.generate("q", images[0])


def test_a_conversation_about_an_image(pair, images: list) -> None:
    """It is encoded once, stays when turns are left out, and another one begins a new conversation."""
    _, ours = pair
    ours.max_seq_len = 150
    talk = Conversation(ours, "S", prompt_layout="dialog", image=images[0])
    how = {"max_gen_len": 12, "temperature": 0.0}
    for _ in range(4):
        *_, answer = talk.ask("What is it?", **how)
    assert ours.encoder.seen == 1 and talk.note and answer
    fresh = Conversation(ours, "S", prompt_layout="dialog", image=images[1])
    fresh.history = talk.history[:-1]
    assert [*fresh.ask("What is it?", **how)][-1] == answer
    talk.look_at(images[2])
    assert not talk.history
    *_, other = talk.ask("What is it?", **how)
    alone = Conversation(ours, "S", prompt_layout="dialog", image=images[2])
    assert [*alone.ask("What is it?", **how)][-1] == other
    talk.look_at(None)
    *_, blind = talk.ask("What is it?", **how)
    assert blind != other
    with pytest.raises(ConfigError, match="give"):
        next(talk.ask("x", image=images[0]))
