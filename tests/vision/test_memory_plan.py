"""The plan of a step with images, beside what one allocates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from accessory import MetaModel
from accessory.data.batch import IGNORE, Document, Inset
from accessory.memory.plan import StepMemory
from accessory.memory.vision import VisionMemory
from accessory.method import Attachment
from accessory.parallel.groups import Layout
from tests.memory.allocated_peak import AllocatedPeak
from tests.vision.seeing import packed, picture

transformers = pytest.importorskip("transformers", reason="the extra vision is not installed")
pytest.importorskip("PIL", reason="the extra vision is not installed")
KINDS = {
    "llama_qformerv2_peft": {"vision_tuning": True, "lora_rank": 4},
    "llama_qformerv2": {},
    "llama_peft": {"vision_tuning": True},
    "llama_adapter": {
        "trainable_mode": "mm_stage1",
        "prefix_len": 4,
        "v_embed_dim": 64,
        "v_depth": 2,
        "v_num_heads": 2,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [8, 90])
def test_a_step(kind: str, text: int, tiny_base: Path, blip2: tuple, clip: tuple) -> None:
    """Within 6 %, with few tokens beside the images, where encoding takes most, and with many."""
    encoder = blip2[1] if "qformer" in kind else clip[1]
    model = MetaModel.from_pretrained(
        tiny_base, llama_type=kind, vision_path=encoder, dtype="fp32", train=True, llama_config=KINDS[kind],
        quant=kind.endswith(("_peft", "_adapter")), device="cpu",
    )  # fmt: skip
    rows, pictures = model.vision.place.rows, 12
    numbers = np.random.default_rng(0)

    def document(number: int) -> Document:
        """Rows, then text, all of it learned."""
        tokens = np.array([0] * rows + numbers.integers(2, 500, text).tolist())
        labels = np.where(np.arange(len(tokens)) < rows, IGNORE, np.roll(tokens, -1))
        return Document(tokens, labels, number, (Inset(0, rows, picture(number)),))

    batch = packed(*map(document, range(pictures)))
    parameters = model.get_trainable_params()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, fused=True)

    def step() -> None:
        """One of training."""
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(t.untyped_storage().nbytes() for t in (*model.llma.parameters(), *moments))
    with AllocatedPeak() as peak:
        step()
    attachment = Attachment(trainable={name.removeprefix("llma.") for name in parameters})
    plan = StepMemory(
        model.llma, attachment, Layout(), tokens=len(batch.tokens), longest=batch.lengths[0], data_parallel="sdp",
        seen=(model.vision, pictures),
    ).plan(0)  # fmt: skip
    assert plan.encoder == sum(p.nbytes for p in getattr(model.llma, model.vision.encoder).parameters())
    assert plan.total - plan.buffers == pytest.approx(held + peak.bytes, rel=0.06)


def test_ranks_divide_images_where_that_takes_less(tiny_base: Path, blip2: tuple) -> None:
    """One image takes as much on each of two ranks; of twelve each has half."""
    model = MetaModel.from_pretrained(
        tiny_base, llama_type="llama_qformerv2", vision_path=blip2[1], device="cpu", train=True
    )
    for ranks, pictures, divides in ((1, 12, False), (2, 1, False), (2, 12, True)):
        layout = Layout(world_size=ranks, mp_size=ranks)
        memory = VisionMemory(model.llma, model.vision, Attachment(), layout, pictures)
        assert memory.divides is divides
        share = pictures // ranks if divides else pictures
        assert memory.working == model.vision.working_bytes(share, torch.bfloat16)
