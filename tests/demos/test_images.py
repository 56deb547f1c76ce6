"""Demos that are asked about images: pages in a browser, on one rank and two, and the terminal."""

from __future__ import annotations

import base64
import io
import json
import socket
from pathlib import Path

import httpx
import pytest
from gradio import Blocks
from gradio_client import Client
from gradio_client.exceptions import AppError

from accessory.config import FinetuneConfig, ImagePageConfig
from accessory.conversation import Conversation
from accessory.errors import ConfigError, DataError
from accessory.eval.predict import predictions, questions
from accessory.finetuning import finetune
from accessory.meta import MetaModel, Sampling
from accessory.multi_gpu import MultiGpuWrapper
from accessory.parallel import groups
from demos.sent_images import MOST_IMAGE_BYTES, image_bytes, sendable
from demos.talks import Talks
from tests.browser import Browser, Visitor, usable
from tests.demos.pages import served
from tests.here import run_here
from tests.vision.tiny import write_blip2

Image, ImageDraw = (
    pytest.importorskip(f"PIL.{name}", reason="the extra vision is not installed") for name in ("Image", "ImageDraw")
)
DEMOS = Path(__file__).resolve().parents[2] / "demos"
QUESTION, THEN = "What is it?", "Which colour?"
ANSWERS, COLOURS = ["A red disc.", "A blue square.", "I see nothing."], ["Red.", "Blue."]
GREEDY = ("--temperature", 0, "--max_gen_len", 20, "--max_seq_len", 300, "--dtype", "fp32")
HOW = {"temperature": 0, "max_gen_len": 20}
ASK, ANSWER = "button.primary", "[...document.querySelectorAll('textarea')].pop().value"
SHOWN = "document.querySelector('#image img')?.getAttribute('src')"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A red disc as a JPEG, a blue square as a PNG, and what only says that it is one."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour, draw in (("disc.jpg", "red", "ellipse"), ("square.png", "blue", "rectangle")):
        image = Image.new("RGB", (640, 400), "white")
        getattr(ImageDraw.Draw(image), draw)((60, 80, 300, 320), fill=colour)
        image.save(folder / name)
    (folder / "false.png").write_bytes(b"no image at all")
    return [folder / name for name in ("disc.jpg", "square.png", "false.png")]


@pytest.fixture(scope="module")
def data(pictures: list[Path]) -> Path:
    """Two conversations about an image, and a question without one."""
    records: list[dict] = []
    for place, answer in enumerate(ANSWERS):
        turns = [(QUESTION, answer), *[(THEN, colour) for colour in COLOURS[place : place + 1]]]
        said = [
            {"from": who, "value": words} for turn in turns for who, words in zip(("human", "gpt"), turn, strict=True)
        ]
        records.append({"conversations": said} | ({"image": pictures[place].name} if len(turns) > 1 else {}))
    file = pictures[0].parent / "data.json"
    file.write_text(json.dumps(records))
    return file


@pytest.fixture(scope="module")
def seeing(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What flags of upstream's QF script train on the files that its stage 1 leaves: in 50 steps, the right answers."""
    from tests.vision.seeing import write_stage_one  # needs the extra vision

    folder = tmp_path_factory.mktemp("seeing")
    (folder / "stage1").mkdir()
    write_blip2(folder / "blip2")
    write_stage_one(folder / "stage1", tiny_base, folder / "blip2")
    (folder / "lora.json").write_text('{"lora_rank": 4, "vision_tuning": true}')
    finetune(
        FinetuneConfig(
            pretrained_path=[folder / "stage1"], llama_type="llama_qformerv2_peft", tokenizer_path=folder,
            llama_config=[folder / "params.json", folder / "lora.json"], data_config=data, quant=True, device="cpu",
            only_save_trainable=True, max_words=200, batch_size=3, epochs=50, warmup_epochs=0, lr=2e-2, dialog=True,
            image_transform="padded_resize", output_dir=folder / "output", save_interval=50,
        )
    )  # fmt: skip
    return folder / "output" / "epoch49"


@pytest.fixture(scope="module")
def model(seeing: Path) -> MetaModel:
    """That of the demos, in this process."""
    groups.start("cpu")
    return MetaModel.from_pretrained(seeing, max_seq_len=300, dtype="fp32")


HANDED = {"drop": "new DragEvent('drop', {dataTransfer: held, bubbles: true})",
          "paste": "new ClipboardEvent('paste', {clipboardData: held, bubbles: true})"}  # fmt: skip


def upload(visitor: Visitor, file: Path, how: str = "choose") -> None:
    """Choose, drop or paste a file, and wait for the square that the model sees."""
    visitor.wait(usable("button.primary"))
    before = visitor.js(SHOWN) or ""
    if how == "choose":
        visitor.upload("#image input", file)
    else:
        data = base64.b64encode(file.read_bytes()).decode()
        visitor.js(
            f"(() => {{ const bytes = Uint8Array.from(atob('{data}'), each => each.charCodeAt(0));"
            "const held = new DataTransfer(); held.items.add(new File([bytes], 'x', {type: 'image/png'}));"
            f"document.querySelector('#image label').dispatchEvent({HANDED[how]}); }})()"
        )
    visitor.wait(f"{SHOWN}?.startsWith('data:image/png') && {SHOWN} !== {json.dumps(before)}")


def refused(visitor: Visitor, file: Path) -> None:
    """Choose a file that is told to be no image."""
    visitor.upload("#image input", file)
    visitor.wait("document.body.innerText.includes('The image is no JPEG, PNG, WebP or GIF.')")


def test_a_question_about_a_picture_on_a_page_of_two_ranks(
    seeing: Path, model: MetaModel, pictures: list[Path], clean_environment, tmp_path: Path
) -> None:
    """In a browser: the picture is shown as the model sees it, another one gets another answer, none a third."""
    assert [model.generate(model.question(QUESTION), image, **HOW) for image in (*pictures[:2], None)] == ANSWERS
    part = ("--pretrained_path", seeing, "--image_transform", "padded_resize")
    demo = (DEMOS / "single_turn_mm.py", clean_environment, *part, *GREEDY)
    with served(*demo, ranks=2) as (page, client), Browser(tmp_path) as browser:
        visitor = browser.visit(client.src)
        for image, answer in zip(pictures, ANSWERS, strict=True):
            if answer == ANSWERS[2]:
                refused(visitor, image)
                visitor.wait(f"!{SHOWN}")
            else:
                upload(visitor, image, "choose" if image is pictures[0] else "paste")
            visitor.type("textarea", QUESTION)
            visitor.click(ASK)
            visitor.wait(f"{ANSWER} === {json.dumps(answer)}")
            visitor.wait(usable(ASK))
            visitor.picture(tmp_path / f"{image.name} asked.png")
        assert not visitor.complaints()
        _api(client, pictures, model)
    words = page.stdout.read().partition("Received 15 death signal")[0]  # torchrun prints a traceback of its own
    assert "Traceback" not in words, words[-3000:]


def _api(client: Client, pictures: list[Path], model: MetaModel) -> None:
    """The same from a program, and what is refused."""
    disc = "data:image/jpeg;base64," + base64.b64encode(pictures[0].read_bytes()).decode()
    settings = (QUESTION, "", model.prompt_layout, 20, 0, 1)
    assert client.predict(*settings, disc, "padded_resize", api_name="/ask") == ANSWERS[0]
    seen = client.predict(disc, "padded_resize", api_name="/look")
    assert client.predict(*settings, seen, "resized_center_crop", api_name="/ask") == ANSWERS[0]
    for image, transform, said in (
        (str(pictures[0]), "padded_resize", "The image is no data URL"),
        (disc, "padded_resise", "Did you mean 'padded_resize'"),
        (disc[:-800], "padded_resize", "The image breaks off"),
        ("data:image/png;base64,!", "padded_resize", "The image is no base64"),
    ):
        with pytest.raises(AppError, match=said):
            client.predict(*settings, image, transform, api_name="/ask")
    named = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError, match="This page takes no files"):
        client.predict(named, "padded_resize", api_name="/look")
    for place in ("file=http://example.com/a.png", f"file={pictures[0]}", "proxy=http://example.com/a.png"):
        assert httpx.get(f"{client.src}gradio_api/{place}").status_code == 403
    with pytest.raises(Exception, match=r"413|at most"):
        client.predict("data:image/png;base64," + "A" * (MOST_IMAGE_BYTES * 3 // 2), "padded_resize", api_name="/look")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
def test_a_conversation_about_a_picture_on_a_page(
    seeing: Path, model: MetaModel, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two turns; what is refused changes nothing; another picture, or another transform, begins anew."""
    expected, padded, cropped = {}, "padded_resize", "resized_center_crop"
    for image, transform in ((0, padded), (1, padded), (1, cropped), (None, padded)):
        given = None if image is None else pictures[image]
        talk = Conversation(model, image=given, image_transform=transform)
        expected[image, transform] = [[*talk.ask(question, **HOW)][-1] for question in (QUESTION, THEN)]
    assert [expected[image, padded][0] for image in (0, 1, None)] == ANSWERS
    assert [expected[image, padded][1] for image in (0, 1)] == COLOURS

    def said(visitor: Visitor) -> list[str]:
        return visitor.js("[...document.querySelectorAll('#said .bot .message-content')].map(each => each.innerText)")

    def ask(visitor: Visitor, answers: list[str]) -> None:
        visitor.type("#question textarea", (QUESTION, THEN)[len(answers) - 1])
        visitor.press("Enter")
        visitor.wait(f"document.querySelectorAll('#said .bot .message-content').length == {len(answers)}")
        visitor.wait(usable("#ask"))
        assert list(map(letters, said(visitor))) == list(map(letters, answers))

    def visit(page: Blocks) -> None:
        with Browser(tmp_path) as browser:
            visitor = browser.visit(page.local_url)
            first, second = expected[0, padded], expected[1, padded]
            upload(visitor, pictures[0])
            ask(visitor, first[:1])
            ask(visitor, first)
            assert "Another image begins a new conversation." in visitor.text()
            visitor.picture(tmp_path / "two turns.png")
            shown = visitor.js(SHOWN)
            refused(visitor, pictures[2])
            visitor.wait(f"{SHOWN} === {json.dumps(shown)}")
            assert len(said(visitor)) == 2
            (tmp_path / "large.png").write_bytes(bytes(MOST_IMAGE_BYTES + 1))
            visitor.upload("#image input", tmp_path / "large.png")
            visitor.wait("document.body.innerText.includes('An image has at most 10 MiB here.')")
            upload(visitor, pictures[1], "drop")
            visitor.wait("!document.querySelector('#said .message-content')")
            ask(visitor, second[:1])
            visitor.click("#transform input")
            visitor.js("[...document.querySelectorAll('[role=option]')].find(e => e.innerText.includes('crop'))"
                       ".dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))")  # fmt: skip
            visitor.wait("!document.querySelector('#said .message-content')")
            ask(visitor, expected[1, cropped][:1])
            visitor.click("#image button")
            visitor.wait(f"!{SHOWN} && !document.querySelector('#said .message-content')")
            ask(visitor, expected[None, padded][:1])
            assert not visitor.complaints()
        page.close()

    monkeypatch.setattr(Blocks, "block_thread", visit)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--pretrained_path", seeing, *GREEDY, "--device", "cpu", "--port", port)
    assert run_here("demos/multi_turn_mm.py", *flags) == 0


def letters(words: str) -> str:
    """What no rendering of Markdown changes."""
    return "".join(filter(str.isalnum, words))


def test_in_the_terminal(
    seeing: Path, model: MetaModel, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Another image begins another conversation; what was said is saved to be trained on; faults are told."""
    saved = pictures[0].parent / "talk.json"
    lines = (QUESTION, f"/image {pictures[2]}", f"/image {pictures[1]}", QUESTION, f"/save {saved}")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    flags = ("--pretrained_path", seeing, *GREEDY, "--device", "cpu", "--image", pictures[0])
    assert run_here("demos/multi_model_cli.py", *flags) == 0
    said = capsys.readouterr().out
    assert said.index(ANSWERS[0]) < said.index(f"the image '{pictures[2]}' is no JPEG") < said.index(ANSWERS[1])
    (record,) = json.loads(saved.read_text())
    assert record["image"] == pictures[1].name and record["messages"][-1]["content"] == ANSWERS[1]
    (prediction,) = predictions(model, questions(model, saved, image_transform="padded_resize"), how=Sampling.of(**HOW))
    assert prediction["prediction"] == prediction["reference"] == ANSWERS[1]
    single = ("--image_transform", "padded_resize", "--prompt", QUESTION)
    assert run_here("demos/single_turn_mm.py", *flags, *single) == 0
    assert f"A: {ANSWERS[0]}" in capsys.readouterr().out


def test_what_cannot_be_shown(seeing: Path, tiny_base: Path, pictures: list[Path], capsys) -> None:
    """Before the model is loaded: no image, and one for nobody; after it: a model that sees none."""
    base = ("--pretrained_path", tiny_base, "--device", "cpu")
    for more, said in (
        (("--image", pictures[2], "--prompt", "q"), f"--image {pictures[2]}: is no JPEG, PNG, WebP or GIF"),
        (("--image", pictures[0]), "--image goes with --prompt"),
        (("--prompt", "q"), "it has no image encoder"),
    ):
        assert run_here("demos/single_turn_mm.py", *base, *more) == 2
        assert said in capsys.readouterr().err


def test_images_on_their_way(model: MetaModel, pictures: list[Path]) -> None:
    """What is sent comes back; what is none is named."""
    picture = model.picture(pictures[0])
    assert image_bytes(sendable(picture)) == picture.file
    assert image_bytes("") is None and image_bytes(None) is None and sendable(None) == ""
    for wrong in ("x", "data:image/png;base64,?", {"path": "/etc/passwd"}, 7):
        with pytest.raises(ConfigError, match="The image is no"):
            image_bytes(wrong)


def test_whose_conversation_is_about_what(model: MetaModel, pictures: list[Path]) -> None:
    """One that was forgotten begins anew about the image that its page shows; none is exchanged during an answer."""
    talks = Talks(model, ImagePageConfig(pretrained_path=["x"]))
    disc, square = (sendable(model.picture(image)) for image in pictures[:2])
    answers = talks.ask("a", QUESTION, None, HOW, disc, "padded_resize")
    assert next(answers).history[-1].answer
    with pytest.raises(ConfigError, match="An answer is being given"):
        talks.look("a", square, "padded_resize")
    assert [*answers][-1].history[-1].answer == ANSWERS[0]
    for number in (2, 3):
        *_, talk = talks.ask("a", QUESTION, None, HOW, disc, "resized_center_crop")
        assert len(talk.history) == number
    *_, talk = talks.ask("a", QUESTION, None, HOW, square, "padded_resize")
    assert [turn.answer for turn in talk.history] == ANSWERS[1:2]
    assert not talks.look("a", "", "padded_resize").history and talk.picture is None


def test_hostile_uploads(model: MetaModel, pictures: list[Path], tmp_path: Path) -> None:
    """Each is refused by its cause, and the conversation goes on about its own image."""
    from tests.data.test_hostile_images import hostile  # needs Pillow

    (tmp_path / "images").mkdir()
    talks = Talks(model, ImagePageConfig(pretrained_path=["x"]))
    *_, talk = talks.ask("a", QUESTION, None, HOW, sendable(model.picture(pictures[0])), "padded_resize")
    files = {tmp_path / "images" / name: cause for name, cause in hostile(tmp_path / "images")[:16]}
    assert all(file.stat().st_size < MOST_IMAGE_BYTES for file in files)
    for file, cause in files.items():
        sent = "data:;base64," + base64.b64encode(file.read_bytes()).decode()
        with pytest.raises(DataError, match=cause if "parts" not in file.name else "breaks off"):
            talks.look("a", sent, "padded_resize")
    *_, talk = talks.ask("a", THEN, None, HOW, sendable(talk.picture), "padded_resize")
    assert [turn.answer for turn in talk.history] == [ANSWERS[0], COLOURS[0]]


@pytest.mark.slow
def test_images_for_processes_of_their_own(seeing: Path, pictures: list[Path]) -> None:
    """As a path, as bytes, as an image of Pillow, and none."""
    given = [pictures[0], pictures[1].read_bytes(), Image.open(pictures[1]), None]
    with MultiGpuWrapper(seeing, gpus=2, device="cpu", dtype="fp32", max_seq_len=300) as shared:
        question = shared.question(QUESTION)
        assert shared.generate([question] * 4, given, **HOW) == [ANSWERS[0], ANSWERS[1], ANSWERS[1], ANSWERS[2]]
        assert [*shared.stream_generate(question, given[1], **HOW)][-1] == ANSWERS[1]
        assert shared.answers(question, 2, given[0], **HOW) == ANSWERS[:1] * 2
        disc, none = (shared.evaluate_examples("What? A red disc.", "What?", image) for image in (given[0], None))
        assert disc["log_likelihood"] > none["log_likelihood"]
        with pytest.raises(DataError, match=r"false.png' is no JPEG"):
            shared.generate(question, pictures[2])


def test_predictions_of_records_with_images(model: MetaModel, data: Path) -> None:
    """A document's picture stands in its question as in training."""
    found = list(predictions(model, questions(model, data, image_transform="padded_resize"), how=Sampling.of(**HOW)))
    assert [each["prediction"] for each in found] == [each["reference"] for each in found] == [*COLOURS, ANSWERS[2]]
    with pytest.raises(ConfigError, match="Did you mean 'padded_resize'"):
        questions(model, data, image_transform="padded")
